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

from deltalens.backbones.dense.checkpointing import set_grad_checkpointing
from deltalens.backbones.dense.detector_options import DetectorOptions
from deltalens.backbones.dense.fpn import DetectionNeck


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
    padding, and guesses wrong where that batch is mostly padding. As in the first Mask R-CNN and in torchvision,
    regions are sampled half a cell to the right and below (`aligned=False`); detectron2 and mmdetection take it off.
    """

    def __init__(self, strides: Sequence[int], output_size: int, sampling_ratio: int, canonical_scale: int):
        names = [str(level) for level in range(len(strides))]
        super().__init__(names, output_size, sampling_ratio, canonical_scale=canonical_scale)
        exponents = [stride.bit_length() - 1 for stride in strides]
        if any(1 << exponent != stride for exponent, stride in zip(exponents, strides, strict=True)):
            raise ValueError(f"regions are pooled from levels whose strides are powers of two, got {list(strides)}")
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(exponents[0], exponents[-1], canonical_scale)


class Detector:
    """Mixed into torchvision's detectors: what every network of ours says about itself.

    num_classes: without background. adapted: the path of the backbone, all around it is head.
    """

    num_classes: int
    adapted: str

    def _says(self, pyramid: nn.Module, num_classes: int, options: DetectorOptions) -> None:
        self.transform = PaddedBatch(options)
        self.num_classes = num_classes
        paths = {id(module): path for path, module in self.named_modules()}  # type: ignore[attr-defined]
        self.adapted = paths[id(pyramid.backbone)]

    def keep_scores_from(self, threshold: float) -> None:
        """Give detections with scores from `threshold` on, where the head's own `score_threshold` is higher. The better
        ones stay as they are."""
        judge: Any = getattr(self, "roi_heads", self)
        judge.score_thresh = min(judge.score_thresh, threshold)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in backward instead of keeping what they computed."""
        set_grad_checkpointing(self.get_submodule(self.adapted), enable)  # type: ignore[attr-defined]


def neck_of(pyramid: nn.Module, options: DetectorOptions, finest: int, extra: str) -> DetectionNeck:
    """The neck that a detector's options ask for."""
    top_down = options.top_down is not False
    return DetectionNeck(pyramid, options.levels, finest, options.channels, extra, top_down)
