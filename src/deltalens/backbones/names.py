"""Backbones by name, whatever library they come from; folders; checkpoint files. Adapter files carry the name."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from deltalens.backbones.class_prompts import TEMPLATE
from deltalens.backbones.fetching import fetching
from deltalens.backbones.open_clip.mini import NAME as CLIP_MINI
from deltalens.backbones.points.mini import NAME as POINTS_MINI
from deltalens.backbones.preprocessing import record
from deltalens.backbones.timm import named as timm_names
from deltalens.backbones.timm.named import SHIPPED
from deltalens.backbones.zero_shot import ZeroShotClassifier

SOURCE_KEY = "_deltalens_source"
LIBRARIES = ("timm", "hf", "torchvision", "open_clip", "points")
# an adapter's file names the constructor's options, too: none of them may make a library run what it downloads
REFUSED_OPTIONS = ("trust_remote_code", "weights_only", "use_safetensors")


@dataclass(frozen=True)
class Source:
    """Where a backbone came from: enough to build it again.

    name: "timm/swin_tiny_patch4_window7_224.ms_in22k", "hf/facebook/dinov2-small", "torchvision/swin_t.IMAGENET1K_V1",
    "open_clip/ViT-B-32/openai", "deltalens/vit-mini" or "local-dir:path". kwargs: what its constructor was given beside
    the number of classes. checkpoint: a weights file loaded into it, or None. pretrained: False where its weights were
    random, and cannot be had again.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def create_backbone(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    checkpoint: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[str] = TEMPLATE,
    descriptions: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    head: str | None = None,
    head_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a classifier by the name of its backbone, and remember its source and its preprocessing. With `head`, build
    a network for dense prediction.

    name: "timm/<model>[.<tag>]" (the prefix may be left out), "hf/<owner>/<repository>" (transformers),
    "torchvision/<model>[.<weights>]", "open_clip/<model>/<tag>" or "open_clip/hf-hub:<owner>/<repository>",
    "deltalens/swin-mini", "deltalens/vit-mini", "deltalens/clip-mini", or a folder in the format of timm,
    transformers or open_clip. Of point clouds: "deltalens/points-mini", "points/point-mae", "points/point-bert",
    "points/act", "points/recon", whose weights are given as checkpoint.
    num_classes: classes of a fresh head; None for the head that the weights have, if any; 0 for features. checkpoint:
    a .safetensors or .pth file (read with weights_only=True) whose weights are loaded instead of the published ones;
    its head is dropped where class counts differ. class_names: of an open_clip or transformers model with two towers,
    make the classifier whose classes are these texts (`ZeroShotClassifier`), in one or several templates, or with
    descriptions: sentences of each class. head: a dense head on a timm network's maps: "upernet", "fcn", "dpt",
    "setr_pup" for segmentation, "retinanet", "fcos", "cascade_rcnn", "mask_rcnn", "cascade" for boxes and instances;
    num_classes then counts the classes without background. head_options: see `docs/dense.md`. kwargs go to the model's
    constructor (drop_path_rate, features_only...); img_size is understood for every library.

    Raises ValueError for an unknown name (with the nearest ones), FileNotFoundError for a missing checkpoint,
    ConnectionError where weights cannot be fetched, PermissionError for a gated repository, ImportError where the
    library is not installed.
    """
    library, inner = _library_and_name(name)
    refused = [option for option in REFUSED_OPTIONS if option in kwargs]
    if refused:
        raise ValueError(
            f"{refused[0]} is not taken from here, because a name can come from an adapter's file: build the model "
            "with its library and give it to attach"
        )
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint file at {checkpoint}")
    if checkpoint is not None and "local-dir:" in inner:
        raise ValueError(f"{name} is a folder with weights of its own: leave checkpoint= out, or name the architecture")
    weights = None if checkpoint is None else str(checkpoint)
    if head is None and head_options:
        raise ValueError("head_options were given without a head: pass head=, such as head='upernet'")
    if head is not None:
        _check_dense(name, library, head, class_names)
    if class_names is not None:
        _check_texts(name, library, class_names, num_classes)
    with fetching(name):
        if head is not None:
            dense = importlib.import_module("deltalens.backbones.dense.named")
            model, full_name = dense.create(inner, head, head_options, num_classes, pretrained, weights, kwargs)
        elif class_names is None:
            model, full_name = _resolver(library).create(inner, num_classes, pretrained, weights, dict(kwargs))
        else:
            towers = _resolver(library).create_two_towers(inner, pretrained, weights, dict(kwargs))
            full_name = towers.name
            model = ZeroShotClassifier(towers.model, towers.tokenizer, class_names, templates, descriptions)
            record(model, towers.preprocessing)
    written = {key: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for key, v in kwargs.items()}
    if head is not None:
        written |= {"head": head, "head_options": dict(head_options or {})}
    source = Source(full_name, written, weights, pretrained or checkpoint is not None)
    model.__dict__[SOURCE_KEY] = source.to_dict()
    return model


def source_of(model: nn.Module) -> Source | None:
    """The source of a model: as recorded by `create_backbone`, else as timm or transformers remember it."""
    recorded = model.__dict__.get(SOURCE_KEY)
    if recorded is not None and isinstance(model, ZeroShotClassifier):
        texts = {"class_names": list(model.class_names), "templates": list(model.templates)}
        if model.descriptions is not None:
            texts["descriptions"] = {name: list(model.descriptions[name]) for name in model.class_names}
        return Source(**{**recorded, "kwargs": {**recorded["kwargs"], **texts}})
    if recorded is not None:
        return Source(**{**recorded, "kwargs": {**recorded["kwargs"], **timm_names.constructor_options(model)}})
    known = timm_names.source_of(model)
    if known is None and "transformers" in sys.modules:
        known = _resolver("hf").source_of(model)
    return None if known is None else Source(*known)


def list_models(pattern: str = "*", pretrained: bool = True) -> list[str]:
    """Names that `create_backbone` knows and that match a shell pattern; the shipped ones first.

    A pattern with a library's prefix (``torchvision/*``) looks there only. ValueError for "hf/...": the hub is not
    listed. Models of libraries that are not installed are left out.
    """
    known = [*SHIPPED, *([CLIP_MINI] if importlib.util.find_spec("open_clip") else []), POINTS_MINI]
    shipped = [name for name in known if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*/{pattern}")]
    library, _, inner = pattern.partition("/")
    if library in LIBRARIES and inner:
        return shipped + _resolver(library).list_models(inner, pretrained)
    names = list(shipped)
    for library in ("timm", "torchvision", "open_clip", "points"):
        try:
            names += _resolver(library).list_models(pattern, pretrained)
        except ImportError:
            continue
    return names


def library_of(name: str) -> str | None:
    """The library in a source's name; None where it has none."""
    first, slash, _ = name.partition("/")
    if name.startswith(("local-dir:", "hf-hub:")):
        return "timm"
    return first if slash and first in (*LIBRARIES, "deltalens") else None


# ------------------------------------------------------------------ which library
def _check_texts(name: str, library: str, class_names: Sequence[str], num_classes: int | None) -> None:
    if library not in ("open_clip", "hf"):
        raise ValueError(
            f"{name} has no text tower: class_names are for open_clip/... and hf/... models with two towers"
        )
    if num_classes not in (None, len(class_names)):
        raise ValueError(f"num_classes={num_classes} was given with {len(class_names)} class names")


def _check_dense(name: str, library: str, head: str, class_names: Sequence[str] | None) -> None:
    if library != "timm":
        raise TypeError(
            f"head={head!r} needs a timm network that gives maps, and {name} is of another library: use timm/... or "
            "deltalens/swin-mini, deltalens/vit-mini, or build the network yourself and pass backbone= to attach"
        )
    if class_names is not None:
        raise ValueError("class_names make a classifier of texts, which has no dense head: pass num_classes")


def _resolver(library: str) -> ModuleType:
    return importlib.import_module(f"deltalens.backbones.{library}.named")


def _library_and_name(name: str) -> tuple[str, str]:
    """(library, the name inside it) of a name or a folder."""
    if name in SHIPPED:
        return "timm", name
    if f"deltalens/{name.removeprefix('deltalens/')}" == CLIP_MINI:
        return "open_clip", CLIP_MINI
    if f"deltalens/{name.removeprefix('deltalens/')}" == POINTS_MINI:
        return "points", POINTS_MINI
    first, slash, inner = name.partition("/")
    prefixed = bool(slash and inner) and first in LIBRARIES
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or (folder.is_dir() and not (prefixed and _library_of_folder(folder) is None)):
        library = _library_of_folder(folder)
        if library is None:
            raise ValueError(
                f"{folder} is no model folder: it has no config.json of timm or transformers and no "
                "open_clip_config.json"
            )
        return library, f"local-dir:{folder}"
    if folder.is_file():
        raise ValueError(
            f"{name} is a weights file, which does not say of which architecture: pass the architecture as the model "
            f"and the file as checkpoint (--model timm/<architecture> --checkpoint {name})"
        )
    return (first, inner) if prefixed else ("timm", name)


def _library_of_folder(folder: Path) -> str | None:
    """By what lies in it: open_clip_config.json, or config.json with timm's or transformers' keys."""
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if "architecture" in config:
        return "timm"
    return "hf" if "model_type" in config else None
