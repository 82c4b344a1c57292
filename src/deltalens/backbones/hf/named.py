"""Models of transformers by name: `hf/<owner>/<repository>`, or a folder that `save_pretrained` wrote."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltalens.backbones.checkpoint import load_weights, read_weights
from deltalens.backbones.class_prompts import Tokenizer
from deltalens.backbones.feature_classifier import FeatureClassifier
from deltalens.backbones.fetching import missing_library
from deltalens.backbones.hf.preprocessing import as_preprocessing, channels, image_size, load_processor
from deltalens.backbones.preprocessing import record
from deltalens.backbones.two_towers import NamedTwoTowers

HUB_OPTIONS = ("revision", "subfolder")
MODEL_OPTIONS = ("attn_implementation", "dtype")
_POSITIONS = re.compile(r"pos(ition)?_embed")
_HEAD = re.compile(r"classif|^head|^fc\b")


def create(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """(classifier, its full name). options: settings of the configuration (drop_path_rate), img_size, revision,
    subfolder, attn_implementation, dtype (float32 where nothing is said)."""
    _require()
    place = name.removeprefix("local-dir:")
    said = place if place != name else f"hf/{place}"
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    size = options.pop("img_size", None)
    given = {"dtype": "float32", **{key: options.pop(key) for key in MODEL_OPTIONS if key in options}}
    config = _config(place, said, options, hub)
    if config.model_type == "timm_wrapper":
        from deltalens.backbones.timm import named as timm_names

        folder = name.startswith("local-dir:")
        options = {**options, **({} if size is None else {"img_size": size})}
        return timm_names.create(name if folder else f"hf-hub:{place}", num_classes, pretrained, checkpoint, options)
    if getattr(config, "mask_ratio", 0):
        raise ValueError(
            f"{said} is a masked autoencoder, which drops patches at random: take the weights from timm, such as "
            "timm/vit_base_patch16_224.mae"
        )
    processor = load_processor(place, config, **hub)
    build = _Build(place, said, hub, given, _classes(config, num_classes), pretrained and checkpoint is None)
    model = build.model(config, None if size is None else _pair(size))
    if checkpoint is not None:
        body = model.backbone if isinstance(model, FeatureClassifier) else model
        head = {key for key in body.state_dict() if _HEAD.search(key)} if body is model else set()
        load_weights(body, read_weights(checkpoint), head, checkpoint)
    preprocessing = as_preprocessing(processor, config)
    if size is not None:
        preprocessing["input_size"] = [channels(config), *_pair(size)]
    record(model, preprocessing)
    return model, f"hf/{name}"


TWO_TOWERS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def create_two_towers(name: str, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> NamedTwoTowers:
    """Both towers of a CLIP or SigLIP repository, with its tokenizer. options as in `create`, but img_size."""
    _require()
    import transformers

    place = name.removeprefix("local-dir:")
    said = place if place != name else f"hf/{place}"
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    given = {"dtype": "float32", **{key: options.pop(key) for key in MODEL_OPTIONS if key in options}}
    config = _config(place, said, options, hub)
    if config.model_type not in TWO_TOWERS:
        raise ValueError(
            f"{said} is a {config.model_type}, which has no image and text tower that are known here; models of type "
            f"{' or '.join(TWO_TOWERS)} have"
        )
    cls = getattr(transformers, TWO_TOWERS[config.model_type])
    if pretrained and checkpoint is None:
        with _without_report():
            model, report = cls.from_pretrained(place, config=config, output_loading_info=True, **given, **hub)
        _refuse_absent(report["missing_keys"], said, model)
    else:
        given["dtype"] = getattr(torch, given["dtype"]) if isinstance(given["dtype"], str) else given["dtype"]
        model = cls._from_config(config, **given)
    if checkpoint is not None:
        load_weights(model, read_weights(checkpoint), set(), checkpoint)
    words = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **hub)
    length = config.text_config.max_position_embeddings
    preprocessing = as_preprocessing(load_processor(place, config, **hub), config)
    return NamedTwoTowers(model.eval(), texts_to_ids(words, length), preprocessing, f"hf/{name}")


def texts_to_ids(tokenizer: Any, length: int) -> Tokenizer:
    """A tokenizer of transformers as texts -> ids (n, length), padded to the full length as CLIP and SigLIP were."""

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    return tokenize


def source_of(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """(full name, options) of a classifier that its user built with transformers' `from_pretrained`: of the class that
    `create` would build, and at the size that it has now."""
    from transformers import PreTrainedModel

    place = getattr(getattr(model, "config", None), "_name_or_path", "") if isinstance(model, PreTrainedModel) else ""
    cls = _classifier_class(model.config) if place else None
    if cls is None or not isinstance(model, cls):
        return None
    size = image_size(model.config)
    options = {} if size is None else {"img_size": size[0] if size[0] == size[1] else list(size)}
    return f"hf/{'local-dir:' if Path(place).is_dir() else ''}{place}", options


def list_models(pattern: str, pretrained: bool) -> list[str]:
    """There is no list."""
    raise ValueError(
        "the Hugging Face Hub is not listed here: look for a model at https://huggingface.co/models (image "
        "classification or image feature extraction), and name it hf/<owner>/<repository>"
    )


# ------------------------------------------------------------------ configuration
def _require() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_library("transformers", "hf") from error


def _config(place: str, said: str, options: dict[str, Any], hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config, unknown = AutoConfig.from_pretrained(
            place, trust_remote_code=False, return_unused_kwargs=True, **hub, **options
        )
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{said} has code of its own, which is not run here: build the model with transformers and give "
                "it to attach"
            ) from error
        raise ValueError(f"{said} cannot be read by transformers: {str(error).partition(chr(10))[0]}") from error
    unknown = [key for key in options if key in unknown]
    if unknown:
        raise TypeError(f"{type(config).__name__} has no setting {unknown[0]!r}")
    return config


def _classifier_class(config: Any) -> type[nn.Module] | None:
    """transformers' classifier for a configuration, None where it has none. Of several the one that the weights were
    made with, else the first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as KNOWN

    found = KNOWN.get(type(config), ())
    found = found if isinstance(found, (tuple, list)) else (found,)
    named = [cls for cls in found if cls.__name__ in (getattr(config, "architectures", None) or ())]
    return next(iter([*named, *found]), None)


def _classes(config: Any, num_classes: int | None) -> int:
    """Classes of the head; without a wish those of the weights, none where they have no head."""
    if num_classes is not None:
        return num_classes
    has_head = any("ImageClassification" in name for name in getattr(config, "architectures", None) or ())
    return config.num_labels if has_head else 0


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# ------------------------------------------------------------------ model
class _Build:
    """One way of building a model: with weights or without, for so many classes."""

    def __init__(self, place: str, said: str, hub: dict, given: dict, num_classes: int, pretrained: bool):
        self.place, self.said, self.hub, self.given = place, said, hub, given
        self.num_classes, self.pretrained = num_classes, pretrained

    def model(self, config: Any, size: tuple[int, int] | None) -> nn.Module:
        """The classifier, for images of `size` where that is not the configuration's own."""
        cls = _classifier_class(config)
        if cls is not None:
            config.num_labels = self.num_classes
            return self._sized(cls, config, size)
        tower = self._sized(None, config, size)
        tower = getattr(tower, "vision_model", tower)  # of an image and a text tower
        height, width = size or image_size(config) or (224, 224)
        dtype = next(tower.parameters()).dtype
        return FeatureClassifier(tower, self.num_classes, (channels(config), height, width)).to(dtype)

    def _sized(self, cls: type[nn.Module] | None, config: Any, size: tuple[int, int] | None) -> nn.Module:
        present = image_size(config)
        if size in (None, present) or present is None or self._takes(cls, config, size):
            return self._load(cls, config)
        changed = copy.deepcopy(config)
        inner = getattr(changed, "vision_config", changed)
        inner.image_size = size[0] if isinstance(inner.image_size, int) and size[0] == size[1] else list(size)
        before, after = (_shapes(self._empty(cls, each)) for each in (config, changed))
        differing = [name for name in after if before.get(name) != after[name]]
        _check_positions(self.said, differing, size)
        if not self.pretrained or not differing:
            return self._load(cls, changed)
        original = self._load(cls, config)
        tensors = original.state_dict()
        patch = inner.patch_size if isinstance(inner.patch_size, int) else inner.patch_size[0]
        for name in differing:
            tensors[name] = _resample(tensors[name], after[name], present, size, patch, self.said)
        model = self._random(cls, changed)
        model.load_state_dict(tensors)
        return model.eval()

    def _load(self, cls: type[nn.Module] | None, config: Any) -> nn.Module:
        if not self.pretrained:
            return self._random(cls, config).eval()
        from transformers import AutoModel, AutoModelForImageClassification

        auto = AutoModel if cls is None else AutoModelForImageClassification
        with _without_report():
            model, report = auto.from_pretrained(
                self.place,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **self.hub,
                **self.given,
            )
        absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        _refuse_absent([key for key in absent if cls is None or not _HEAD.search(key)], self.said, model)
        return model

    def _random(self, cls: type[nn.Module] | None, config: Any) -> nn.Module:
        from transformers import AutoModel, AutoModelForImageClassification

        given = {**self.given, "dtype": _dtype(self.given["dtype"])}
        return (AutoModel if cls is None else AutoModelForImageClassification).from_config(config, **given)

    def _empty(self, cls: type[nn.Module] | None, config: Any) -> nn.Module:
        with torch.device("meta"):
            return self._random(cls, copy.deepcopy(config))

    def _takes(self, cls: type[nn.Module] | None, config: Any, size: tuple[int, int]) -> bool:
        """Whether the model takes images of that size as it is: convolutions, rotary positions, positions that it
        interpolates itself."""
        model = self._empty(cls, config).eval()
        try:
            with torch.no_grad():
                model(torch.empty(1, channels(config), *size, device="meta", dtype=next(model.parameters()).dtype))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # how libraries refuse a size
            return False
        return True


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers' table of tensors that the file lacks is left out: what it may lack is checked, and said, here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _dtype(dtype: Any) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_positions(said: str, differing: list[str], size: tuple[int, int]) -> None:
    other = [name for name in differing if not _POSITIONS.search(name)]
    if other:
        raise ValueError(
            f"{said} cannot be built for images of {size[0]}x{size[1]} pixels: {other[0]} depends on the size, and "
            "only position embeddings are resampled"
        )


def _resample(
    table: torch.Tensor, shape: tuple[int, ...], old: tuple[int, int], new: tuple[int, int], patch: int, said: str
) -> torch.Tensor:
    """Position embeddings (N, C) or (1, N, C) for another grid: bicubic with antialiasing, prefix tokens kept."""
    from timm.layers import resample_abs_pos_embed

    grids = [(height // patch, width // patch) for height, width in (old, new)]
    prefix = table.shape[-2] - math.prod(grids[0])
    if prefix < 0 or prefix != shape[-2] - math.prod(grids[1]):
        raise ValueError(
            f"{said} cannot be built for images of {new[0]}x{new[1]} pixels: its position embeddings are no grid"
        )
    given = table if table.dim() == 3 else table[None]
    return resample_abs_pos_embed(given, grids[1], grids[0], num_prefix_tokens=prefix).reshape(shape)


def _refuse_absent(absent: Iterable[str], said: str, model: nn.Module) -> None:
    absent = sorted(absent)
    if absent:
        raise ValueError(
            f"the weights of {said} lack {len(absent)} tensors of {type(model).__name__}, such as {absent[0]}, which "
            "would be left random: they were made for another class"
        )
