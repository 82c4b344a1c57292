"""What an adapter knows beside its tensors: class names, preprocessing, metrics."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltalens.backbones.unknown import input_size
from deltalens.lifecycle.state import adapter_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def adapter_info(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The adapter's own dictionary, saved with it: "class_names", "preprocessing", "task", "metrics". Write to it
    freely with JSON-able values. name: None means the active adapter."""
    return adapter_of(model, name)[1].info


def class_names(model: nn.Module, name: str | None = None) -> list[str] | None:
    """Class names in the order of the head's outputs, or None where they were never given."""
    return adapter_info(model, name).get("class_names")


def preprocessing(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """How images become inputs: input_size (C, H, W), mean, std, interpolation, crop_pct.

    What the adapter was trained with; where it does not say, what the backbone's own configuration says.
    """
    info = adapter_info(model, name).get("preprocessing") if "_deltalens" in model.__dict__ else None
    return {**backbone_preprocessing(model), **(info or {})}


def backbone_preprocessing(model: nn.Module) -> dict[str, Any]:
    """Preprocessing from a timm model's configuration; the input size is the model's present one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return {
        "input_size": list(input_size(model)),
        "mean": list(config.get("mean", IMAGENET_MEAN)),
        "std": list(config.get("std", IMAGENET_STD)),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": config.get("crop_pct", 1.0),
    }
