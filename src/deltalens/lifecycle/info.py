"""What an adapter knows beside its tensors: class names, preprocessing, metrics."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltalens.backbones.preprocessing import preprocessing_of
from deltalens.lifecycle.state import KEY, adapter_of, state_of


def adapter_info(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The adapter's own dictionary, saved with it: "class_names", "preprocessing", "task", "metrics". Write to it
    freely with JSON-able values. name: None means the active adapter."""
    return adapter_of(model, name)[1].info


def class_names(model: nn.Module, name: str | None = None) -> list[str] | None:
    """Class names in the order of the head's outputs, or None where they were never given."""
    return adapter_info(model, name).get("class_names")


def preprocessing(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """How images become inputs: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode. Of a model of
    point clouds: kind ("points"), num_points, and normalize ("unit_sphere" or None).

    What the adapter was trained with; where it does not say, or none is active, what the backbone's library says.
    """
    adapted = KEY in model.__dict__ and (name is not None or state_of(model).active)
    info = adapter_info(model, name).get("preprocessing") if adapted else None
    return {**preprocessing_of(model), **(info or {})}
