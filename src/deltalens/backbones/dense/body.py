"""A timm network that is to give maps: which kind it is, which maps it has, and which image sizes it takes.

The network is built once on the meta device, where it costs no memory, and tried there; what is found decides how the
true one is built.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltalens.backbones.timm import named
from deltalens.backbones.unknown import input_size


@dataclass(frozen=True)
class Body:
    """A timm network with what is known of its maps.

    name: the network's class, for messages. module: the `features_only` form of a hierarchical network; a plain one
        (one stride throughout, as a ViT) itself, without classifier. plain: which of the two. channels, strides: of
        each map that it can give; of a plain network, one for each block. fixed_size: (H, W) where it takes images of
        this size only, None where any size goes. multiple: image sides that the network takes are multiples of this.
        image_size: (H, W) that its weights were made for, or that was asked for.
    """

    name: str
    module: nn.Module
    plain: bool
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    fixed_size: tuple[int, int] | None
    multiple: int
    image_size: tuple[int, int]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens (class token, registers) stand before those of the map."""
        if not hasattr(self.module, "forward_intermediates"):
            return 0
        gives_them = "return_prefix_tokens" in inspect.signature(self.module.forward_intermediates).parameters
        return getattr(self.module, "num_prefix_tokens", 0) if gives_them else 0


def build(name: str, pretrained: bool, checkpoint: str | None, options: Mapping[str, Any]) -> tuple[Body, str]:
    """(body, the network's full name) of a timm model by its name (`backbones/timm/named.py`).

    Networks that can are built for images of any size: position embeddings are interpolated at each forward, masks of
    windows made anew, windows kept whole on maps that are larger than in pretraining. options go to the network's
    constructor. Raises TypeError for a network without maps.
    """
    options = dict(options)
    size = _pair(options.pop("img_size", None))
    plan = _plan(name, _Options(options), size)
    form = {} if plan.plain else {"features_only": True}
    module, full_name = named.create(name, 0 if plan.plain else None, pretrained, checkpoint, {**plan.options, **form})
    body = Body(
        plan.name,
        module,
        plan.plain,
        plan.channels,
        plan.strides,
        plan.fixed_size,
        plan.multiple,
        size or plan.image_size,
    )
    return body, full_name


class _Options(dict):
    """A constructor's options as a key of what was found with them."""

    def __hash__(self):  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@dataclass(frozen=True)
class _Plan:
    name: str
    plain: bool
    options: dict[str, Any]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    fixed_size: tuple[int, int] | None
    multiple: int
    image_size: tuple[int, int]


@functools.lru_cache(maxsize=32)
def _plan(name: str, given: _Options, size: tuple[int, int] | None) -> _Plan:
    options, sized = dict(given), {} if size is None else {"img_size": size}
    plain_form = _on_meta(name, {**options, **sized})
    takes = _constructor_options(plain_form)
    options |= {"dynamic_img_size": True} if "dynamic_img_size" in takes else {}
    if "img_size" in takes and ("dynamic_img_size" not in takes or "always_partition" in takes):
        options |= sized
    if "always_partition" in takes and _same_tensors(plain_form, _on_meta(name, {**options, "always_partition": True})):
        options.setdefault("always_partition", True)
    strides = _strides(plain_form)
    plain = len(set(strides)) == 1
    if not strides or (plain and not hasattr(plain_form, "forward_intermediates")):
        raise TypeError(_no_maps(plain_form))
    trial = _on_meta(name, {**options, **({} if plain else {"features_only": True})}).eval()
    if not plain:
        strides = tuple(trial.feature_info.reduction())
    multiple = max(strides)
    own = _pair(options.get("img_size")) or input_size(plain_form)[1:]
    rounded = (_up(own[0], multiple), _up(own[1], multiple))
    maps = _maps(trial, own, plain, len(strides)) or _maps(trial, rounded, plain, len(strides))
    if maps is None or len(maps) != len(strides) or any(m.dim() != 4 for m in maps):
        raise TypeError(_no_maps(plain_form))
    channels = tuple(nchw(m, trial).shape[1] for m in maps)
    other = (rounded[0] + multiple, rounded[1] + 2 * multiple)
    anything = _maps(trial, other, plain, len(strides)) is not None
    return _Plan(type(plain_form).__name__, plain, options, channels, strides, None if anything else own, multiple, own)


def _on_meta(name: str, options: Mapping[str, Any]) -> Any:
    with torch.device("meta"), _Uninitialised(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return named.create(name, None, False, None, dict(options))[0]


class _Uninitialised(TorchFunctionMode):
    """Leaves out the filling of weights, which takes most of the time and does nothing to tensors without memory."""

    FILLING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self.FILLING else func(*args, **(kwargs or {}))


def _constructor_options(model: nn.Module) -> set[str]:
    """Names that the constructor of a model takes, those that it hands on to its base class, too."""
    taken: set[str] = set()
    for cls in type(model).__mro__:
        if cls is nn.Module:
            break
        parameters = inspect.signature(cls).parameters
        taken |= set(parameters)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return taken


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (one, other)]
    return shapes[0] == shapes[1]


def _strides(model: nn.Module) -> tuple[int, ...]:
    """The stride of each map that timm says a model has."""
    info: Any = getattr(model, "feature_info", None) or ()
    found = info.reduction() if hasattr(info, "reduction") else [each.get("reduction") for each in info]
    return tuple(found) if all(isinstance(stride, int) for stride in found) else ()


def _maps(model: Any, size: tuple[int, int], plain: bool, count: int) -> Sequence[Tensor] | None:
    """What a model on the meta device gives for images of a size; None where it refuses them."""
    images = torch.empty(1, 3, *size, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            if plain:
                maps = model.forward_intermediates(images, indices=list(range(count)), intermediates_only=True)
            else:
                maps = model(images)
            return list(maps)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
        return None


def nchw(feature_map: Tensor, network: nn.Module) -> Tensor:
    """A map of a `features_only` network, channels first: Swin's are channels last."""
    last = str(getattr(getattr(network, "output_fmt", None), "value", "NCHW")) == "NHWC"
    return feature_map.permute(0, 3, 1, 2) if last else feature_map


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _no_maps(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} gives no maps: a dense head needs a timm network that has features_only=True, or "
        "forward_intermediates with maps"
    )
