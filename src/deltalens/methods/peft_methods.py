"""The tuners of the peft library as methods: `from_peft`, and by name `peft/loha`, `peft/dora`, `peft/ia3` and more."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, make_config, method_class, register_later
from deltalens.methods.peft_layers import PeftLayers
from deltalens.sites.anatomy import Anatomy
from deltalens.sites.weights import refuse_unfit_target

if TYPE_CHECKING:
    from peft import PeftConfig

# name -> default learning rate, by analogy: 5e-3 for changes of a weight as in LoRA, 1e-2 where only vectors are
# trained, 1e-3 for rotations and for tensors near the size of the weight
LEARNING_RATES = {
    **dict.fromkeys(("adalora", "deft", "dora", "glora", "hira", "lily", "loha", "lokr", "lora", "peanut"), 5e-3),
    **dict.fromkeys(("adamss", "c3a", "delora", "frod", "randlora", "supertuning", "unilora", "vblora"), 5e-3),
    **dict.fromkeys(("beft", "ia3", "pvera", "road", "tinylora", "vera", "fourierft"), 1e-2),
    **dict.fromkeys(("boft", "gralora", "hra", "miss", "oft", "psoft", "shira", "waveft"), 1e-3),
}
# tuners of peft that cannot be used on the linear layers of a vision backbone, and why
UNFIT = {
    **dict.fromkeys(
        ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "cpt", "cartridge"),
        "it makes prompts for transformers' language models; use VPTConfig",
    ),
    "adaption_prompt": "it is written for LLaMA's attention",
    "ln_tuning": "it trains norm layers, not linear ones",
    "osf": "it hooks its layers with functions that cannot be copied or saved",
    "poly": "its layers need a task number with every input",
    "shadow": "it runs a second transformers model beside the first",
    "trainable_tokens": "it trains rows of a token embedding",
    "xlora": "it mixes LoRA adapters of a transformers model that are trained already",
}
# peft's settings that our lifecycle takes the place of: value that they must keep, and what to do instead
TAKEN = {
    "bias": ("none", "add BitFitConfig() to the list of methods"),
    "modules_to_save": (None, "the head is trained and saved anyway; for more add FullConfig() or another method"),
    "layer_replication": (None, "deltalens keeps the backbone as it is"),
    "target_parameters": (None, "name linear layers with target_modules"),
    "trainable_token_indices": (None, "vision backbones have no token embedding"),
    "megatron_config": (None, "only modules of PyTorch itself can be adapted"),
    "megatron_core": ("megatron.core", "only modules of PyTorch itself can be adapted"),
}
_DEFAULTS = {"dora": {"use_dora": True}, "adalora": {"total_step": 1}}
_IGNORED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
            "task_type"}  # fmt: skip


def from_peft(peft_config: PeftConfig) -> Method:
    """A configuration of the peft library as a method that `attach` takes, alone or with others.

        dl.attach(model, dl.from_peft(peft.LoHaConfig(target_modules=["qkv", "fc1"])))

    peft's own layers wrap the targeted linear layers and rename them as peft does: while the adapter is active,
    `blocks.0.attn.qkv.weight` is `blocks.0.attn.qkv.base_layer.weight`. That differs from all other methods here.
    Switching, `disable_adapter` and `detach` put the original layers back. Everything else works as for other methods:
    files (by the method name "peft/loha"), counts, merging where peft can merge, combinations.

    target_modules are path endings or one regular expression, as in peft; "all-linear" means the linear layers of the
    backbone. Without target_modules the layers that hold q and v are taken (a fused qkv is one layer), for IA3 those of
    k, v and the input of fc2, and fc1 and fc2 in blocks without attention.

    Raises TypeError for something that is no peft configuration, ValueError for a tuner that does not work on vision
    backbones (the message says why) and for settings that deltalens takes over (bias, modules_to_save).
    """
    _import_peft()
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig) or peft_config.peft_type is None:
        raise TypeError(f"from_peft takes a configuration such as peft.LoHaConfig(), not {peft_config!r}")
    kind = _plain(peft_config.peft_type).lower()
    if kind == "lora" and peft_config.use_dora:
        kind = "dora"
    if kind not in LEARNING_RATES:
        raise ValueError(f"peft's {kind} is not available: {UNFIT.get(kind, 'it was not tried on vision backbones')}")
    cls = method_class(f"peft/{kind}")
    known, settings = {field.name for field in dataclasses.fields(cls)}, {}
    for field in dataclasses.fields(peft_config):
        value = getattr(peft_config, field.name)
        if field.name in TAKEN:
            must_be, instead = TAKEN[field.name]
            if value != must_be and value:
                raise ValueError(f"{type(peft_config).__name__}.{field.name}={value!r} is not taken over: {instead}")
        elif field.name in known:
            settings[field.name] = _plain(value)
        elif field.name not in _IGNORED and value != _default(field):
            raise ValueError(f"{type(peft_config).__name__}.{field.name} cannot be saved; leave it at its default")
    return cls(**settings)


class PeftMethod(Method):
    """Base of the methods made from peft's configurations: the same settings with the same defaults."""

    tuner: ClassVar[str]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            if isinstance(value, tuple) and field.name.endswith("_modules"):
                value = tuple(sorted(value))  # a set to peft
            object.__setattr__(self, field.name, value)
        self.peft_config()

    def peft_config(self) -> PeftConfig:
        """The settings as a fresh configuration of peft. ValueError where peft refuses them."""
        _import_peft()
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        settings = {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}
        try:
            return PEFT_TYPE_TO_CONFIG_MAPPING[self.tuner](**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def wrap(self, anatomy: Anatomy) -> PeftLayers:
        config = self.peft_config()
        if config.target_modules is None:
            _choose_targets(config, anatomy)
        return PeftLayers(self.name, _targets(config, anatomy, self.name), config)

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        """AdaLoRA's regulariser, which peft adds in the forward of its own model: the mean over all A and B of
        ||A A^T - I|| and ||B^T B - I||."""
        if self.tuner != "ADALORA":
            return {}
        from peft.tuners.adalora import AdaLoraLayer

        terms = []
        for layer in model.modules():
            if isinstance(layer, AdaLoraLayer):
                grams = [a @ a.T for a in layer.lora_A.values()] + [b.T @ b for b in layer.lora_B.values()]
                terms += [(gram - torch.eye(len(gram)).to(gram)).norm() for gram in grams]
        return {"orthogonality": self.orth_reg_weight * sum(terms) / len(terms)} if terms else {}

    def __repr__(self) -> str:
        defaults = {field.name: _plain(_default(field)) for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
        return f"{type(self).__name__}({shown})"

    def __reduce__(self):
        return _remake, (self.name, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def _remake(name: str, settings: dict[str, Any]) -> Method:
    return make_config(name, **settings)


@functools.cache
def _build(name: str) -> type[PeftMethod]:
    """The class of the method `peft/<kind>`, its fields read from peft's configuration."""
    _import_peft()
    import peft

    kind = name.partition("/")[2]
    tuner = "LORA" if kind == "dora" else kind.upper()
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(tuner)
    if config_class is None:
        raise ValueError(f"peft {peft.__version__} has no {kind}: upgrade peft")
    fields = []
    for field in dataclasses.fields(config_class):
        default = _DEFAULTS.get(kind, {}).get(field.name, _default(field))
        if field.name not in _IGNORED | TAKEN.keys() and _is_plain(default):
            fields.append((field.name, Any, _field(default, {"help": _first_sentence(field.metadata.get("help", ""))})))
    cls = dataclasses.make_dataclass(
        f"Peft{config_class.__name__}" if kind != "dora" else "PeftDoraConfig",
        fields,
        bases=(PeftMethod,),
        namespace={
            "__doc__": f"{config_class.__name__.removesuffix('Config')} of the peft library on linear layers"
            + (" (LoRA with use_dora)." if kind == "dora" else "."),
            "tuner": tuner,
            "learning_rate": LEARNING_RATES[kind],
        },
        frozen=True,
        repr=False,
    )
    cls.__module__, cls.name = __name__, name
    return cls


# ------------------------------------------------------------------ which layers
def _choose_targets(config: PeftConfig, anatomy: Anatomy) -> None:
    """Fill in target_modules that the user left out."""
    ia3 = _plain(config.peft_type) == "IA3"
    endings = _part_layers(anatomy, ("k", "v", "fc2") if ia3 else ("q", "v"))
    endings = endings or _part_layers(anatomy, ("fc1", "fc2"))
    if not endings:
        raise ValueError(
            f"the blocks of {type(anatomy.model).__name__} name no linear parts: give target_modules, path endings or "
            "a regular expression of the layers to adapt"
        )
    config.target_modules = endings
    if ia3 and not config.feedforward_modules:
        config.feedforward_modules = _part_layers(anatomy, ("fc2",))


def _part_layers(anatomy: Anatomy, names: tuple[str, ...]) -> set[str]:
    """Paths inside the blocks of the layers that hold these parts."""
    return {block.parts[name].path for block in anatomy.blocks() for name in names if name in block.parts}


def _targets(config: PeftConfig, anatomy: Anatomy, method: str) -> dict[str, tuple[str, nn.Linear]]:
    """Name in the plain classifier -> (path, layer) of every targeted layer. Unfit ones are an error, or left out
    where the user asked for all linear layers."""
    from peft.tuners.tuners_utils import check_target_module_exists

    found: dict[str, tuple[str, nn.Linear]] = {}
    everything = config.target_modules == "all-linear"
    for path, module in anatomy.model.named_modules():
        name = anatomy.canonical(path)
        if not path or "delta" in path.split("."):
            continue
        wanted = isinstance(module, nn.Linear) if everything else check_target_module_exists(config, name)
        problem = _problem(anatomy, path, module, method) if wanted else None
        if problem and not everything:
            raise ValueError(problem)
        if wanted and not problem:
            found[name] = (path, module)
    if not found:
        raise ValueError(
            f"target_modules={config.target_modules!r} of {method} matches no layer of {type(anatomy.model).__name__}"
        )
    return found


def _problem(anatomy: Anatomy, path: str, module: nn.Module, method: str) -> str | None:
    """Why a layer cannot be wrapped."""
    try:
        refuse_unfit_target(anatomy, path, module, wrapped=True)
    except ValueError as error:
        return str(error).replace("LoRA changes", f"{method} changes")
    return None


# ------------------------------------------------------------------ values
def _plain(value: Any) -> Any:
    """JSON-able, comparable form of a setting: sets sorted, lists as tuples, enums as their values."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{value!r} cannot be written to a file: deltalens takes numbers, words, lists and dictionaries")


def _is_plain(value: Any) -> bool:
    try:
        _plain(value)
    except ValueError:
        return False
    return True


def _listed(value: Any) -> Any:
    """The same with lists for tuples, as peft expects them."""
    if isinstance(value, tuple):
        return [_listed(each) for each in value]
    return {key: _listed(each) for key, each in value.items()} if isinstance(value, dict) else value


def _first_sentence(text: str | tuple[str, ...]) -> str:
    words = " ".join(text if isinstance(text, tuple) else (text,)).split()
    return " ".join(words).partition(". ")[0].removesuffix(".")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _field(default: Any, metadata: dict[str, str]) -> Any:
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _import_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "this method runs the layers of the peft library: pip install 'deltalens[peft]' (or pip install peft)"
        ) from error


register_later([f"peft/{kind}" for kind in LEARNING_RATES], _build)
