"""Resizing, cropping and padding of pictures together with their masks and boxes, as transforms v2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional, query_size

from deltalens.data.dense_items import IGNORED

TRIES = 10


class _Resize(v2.Transform):
    """Resizes to `params["size"]`, None for no change.

    Pictures bilinearly with antialiasing; a pixel of a mask takes the value under its centre, so that edges lie where
    those of picture and boxes do, to half a pixel. torchvision's own takes the value under its upper left corner, which
    moves masks by half a pixel to the right and below.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = params["size"]
        if size is None:
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(_resized_mask(inpt.as_subclass(Tensor), size), like=inpt)
        return self._call_kernel(functional.resize, inpt, size=size, interpolation="bilinear", antialias=True)


class ResizeSides(_Resize):
    """Resize with kept proportions, so that the short side is one of `shorts`, drawn at random, or the long side is
    `long`, whichever is smaller. enlarge=False leaves smaller pictures alone."""

    def __init__(self, shorts: tuple[int, ...], long: int | None = None, enlarge: bool = True):
        super().__init__()
        self.shorts, self.long, self.enlarge = tuple(shorts), long, enlarge

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = query_size(flat_inputs)
        short = self.shorts[int(torch.randint(len(self.shorts), ()))]
        factor = _factor(size, short, self.long)
        return {"size": None if factor >= 1 and not self.enlarge else _times(size, factor)}


class RandomScale(_Resize):
    """Resize by a random factor in `scale` of the largest size with at most the sides `short` and `long`; where both
    are None of the picture's own size."""

    def __init__(self, scale: tuple[float, float], short: int | None = None, long: int | None = None):
        super().__init__()
        self.scale, self.short, self.long = scale, short, long

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = query_size(flat_inputs)
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        return {"size": _times(size, factor * _factor(size, self.short, self.long))}


class ClassCrop(v2.Transform):
    """A random crop of picture and mask, (height, width) or as much as there is.

    Up to ten are drawn, until no class has `max_share` or more of the pixels that are not ignored."""

    def __init__(self, size: tuple[int, int], max_share: float = 1.0):
        super().__init__()
        self.size, self.max_share = size, max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = query_size(flat_inputs)
        mask = next((each for each in flat_inputs if isinstance(each, tv_tensors.Mask)), None)
        cut = (min(self.size[0], height), min(self.size[1], width))
        for _ in range(TRIES):
            top, left = int(torch.randint(height - cut[0] + 1, ())), int(torch.randint(width - cut[1] + 1, ()))
            if self.max_share >= 1 or mask is None or self._mixed(mask[top : top + cut[0], left : left + cut[1]]):
                break
        return {"top": top, "left": left, "height": cut[0], "width": cut[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, **params)

    def _mixed(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
        return bool((counts > 0).sum() > 1) and bool(counts.max() < self.max_share * counts.sum())


class SizeCrop(v2.Transform):
    """A random crop with sides drawn between the two of `sides`, or as much as there is (DETR)."""

    def __init__(self, sides: tuple[int, int]):
        super().__init__()
        self.sides = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = query_size(flat_inputs)
        cut = [self._side(height), self._side(width)]
        top, left = int(torch.randint(height - cut[0] + 1, ())), int(torch.randint(width - cut[1] + 1, ()))
        return {"top": top, "left": left, "height": cut[0], "width": cut[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, **params)

    def _side(self, there: int) -> int:
        low, high = (min(side, there) for side in self.sides)
        return int(torch.randint(low, high + 1, ()))


class PadTo(v2.Transform):
    """Fill picture (with 0) and mask (with 255) at the right and below to (height, width)."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = query_size(flat_inputs)
        return {"padding": [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return self._call_kernel(functional.pad, inpt, params["padding"], fill=fill)


def _factor(size: tuple[int, ...], short: int | None, long: int | None) -> float:
    """The largest factor after which the sides are at most these; 1 without any."""
    factors = [limit / side for limit, side in ((short, min(size)), (long, max(size))) if limit is not None]
    return min(factors, default=1.0)


def _times(size: tuple[int, ...], factor: float) -> list[int]:
    """Sides times a factor, halves rounded up, as mmcv does."""
    return [max(1, int(side * factor + 0.5)) for side in size]


def _resized_mask(mask: Tensor, size: list[int]) -> Tensor:
    """Masks (..., H, W) in another size: pixel i of n takes the value of pixel floor((i + 1/2) N / n) of N."""
    rows, columns = (
        ((2 * torch.arange(new) + 1) * old).div(2 * new, rounding_mode="floor")
        for new, old in zip(size, mask.shape[-2:], strict=True)
    )
    return mask.index_select(-2, rows).index_select(-1, columns)
