"""What torchvision's detectors are given here instead of their own: batches, anchors, precision, regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.poolers import MultiScaleRoIAlign, initLevelMapper

from deltalens.backbones.dense.detector_options import DetectorOptions


class PaddedBatch(GeneralizedRCNNTransform):
    """Images (3, H, W) of any sizes -> one batch, padded with zeros to the right and below.

    torchvision's own normalises and always resizes. Ours does neither: images come normalised, zero is their mean
    colour, and boxes keep their values bit for bit. Where `min_size` is given, images and boxes are resized as
    torchvision does.
    """

    def __init__(self, options: DetectorOptions):
        super().__init__(options.min_size or 1, options.max_size, [0.0] * 3, [1.0] * 3, options.size_divisor)
        self.resizes = options.min_size is not None

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None):
        return super().resize(image, target) if self.resizes else (image, target)


class PyramidAnchors(AnchorGenerator):
    """Anchor boxes (pixels) of each cell of each level, for levels of known strides.

        centre of cell (i, j) of a level with stride s:  ((j + offset) s, (i + offset) s)

    torchvision divides the size of the batch by that of the map instead, which gives a stride of 48 for a map of 2
    cells over 96 pixels although its cells lie 64 pixels apart. sizes, ratios: one tuple a level; a ratio is height /
    width.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ):
        super().__init__(tuple(map(tuple, sizes)), tuple(map(tuple, ratios)))
        self.strides, self.offset = list(strides), offset

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        strides = [[stride, stride] for stride in self.strides]
        levels = self.grid_anchors([list(each.shape[-2:]) for each in feature_maps], strides)
        shifted = [level + self.offset * stride for level, stride in zip(levels, self.strides, strict=True)]
        anchors = torch.cat(shifted)
        return [anchors for _ in image_list.image_sizes]


def anchor_sizes(
    given: Sequence[Sequence[float]] | None, strides: Sequence[int], scales: Sequence[float]
) -> list[tuple[float, ...]]:
    """Sizes (pixels) of the anchors of each level: as given, or scales x stride. ValueError where they do not fit the
    levels."""
    if given is None:
        return [tuple(scale * stride for scale in scales) for stride in strides]
    if len(given) != len(strides) or len({len(level) for level in given}) != 1 or not len(given[0]):
        raise ValueError(
            f"anchor_sizes must name equally many sizes for each of {len(strides)} levels, whose strides are "
            f"{list(strides)}; got {list(given)}"
        )
    return [tuple(level) for level in given]


class RegionPooling(MultiScaleRoIAlign):
    """RoIAlign from the level that fits a box's size, k = floor(canonical_level + log2(sqrt(w h) / canonical_scale)).

    The scales are those of the levels. torchvision guesses them once, from the sizes of the first batch without its
    padding, and guesses wrong where that batch is mostly padding.
    """

    def __init__(self, strides: Sequence[int], output_size: int, sampling_ratio: int, canonical_scale: int):
        names = [str(level) for level in range(len(strides))]
        super().__init__(names, output_size, sampling_ratio, canonical_scale=canonical_scale)
        exponents = [stride.bit_length() - 1 for stride in strides]
        if any(1 << exponent != stride for exponent, stride in zip(exponents, strides, strict=True)):
            raise ValueError(f"regions are pooled from levels whose strides are powers of two, got {list(strides)}")
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(exponents[0], exponents[-1], canonical_scale)


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


def path_of(root: nn.Module, wanted: nn.Module) -> str:
    """The path of a module in another. ValueError where it is not there."""
    for path, module in root.named_modules():
        if module is wanted:
            return path
    raise ValueError(f"{type(wanted).__name__} is no part of {type(root).__name__}")
