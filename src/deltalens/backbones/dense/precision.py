"""Boxes, anchors and losses in float32, whatever the layers compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_precision(value: Any) -> Any:
    """Half-precision tensors as float32, in lists, tuples and dictionaries, too.

    Under autocast layers give bfloat16 or float16, which hold 8 or 11 bits of a number: boxes of an image of 1000
    pixels would be off by up to 2 pixels. Boxes, anchors and losses are computed in float32.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, dict):
        return type(value)((name, full_precision(each)) for name, each in value.items())
    return type(value)(full_precision(each) for each in value)


class InFullPrecision:
    """Mixed into a layer of torchvision's: what it gives is float32, whatever it computes in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return full_precision(super().forward(*args, **kwargs))  # type: ignore[misc]
