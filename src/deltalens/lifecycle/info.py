"""What an adapter knows beside its tensors: class names, preprocessing, metrics."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltalens.backbones.preprocessing import preprocessing_of
from deltalens.lifecycle.state import adapter_of


def adapter_info(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The adapter's own dictionary, saved with it: "class_names", "preprocessing", "task", "metrics". Write to it
    freely with JSON-able values. name: None means the active adapter."""
    return adapter_of(model, name)[1].info


def class_names(model: nn.Module, name: str | None = None) -> list[str] | None:
    """Class names in the order of the head's outputs, or None where they were never given."""
    return adapter_info(model, name).get("class_names")


def preprocessing(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """How images become inputs: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.

    What the adapter was trained with; where it does not say, what the backbone's library says.
    """
    info = adapter_info(model, name).get("preprocessing") if "_deltalens" in model.__dict__ else None
    return {**preprocessing_of(model), **(info or {})}
