"""Features of regions without the half cell that the first Mask R-CNN was off by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from deltalens.backbones.dense.detector_parts import RegionPooling


class AlignedPooling(RegionPooling):
    """`RegionPooling` as detectron2 and mmdetection do it (`aligned=True`): cell (i, j) of a level of stride s is at
    ((j + 1/2) s, (i + 1/2) s), and regions smaller than a cell stay as small as they are. sampling_ratio: points along
    a side of each pooled cell; 0 for as many as the cell is wide, ceil(width / cells), as in mmdetection.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        numbers = torch.cat([torch.full_like(each[:, :1], image) for image, each in enumerate(boxes)])
        regions = torch.cat([numbers, torch.cat(boxes)], 1)
        levels = self.map_levels(boxes)
        found = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (each, scale) in enumerate(zip(maps, self.scales, strict=True)):
            rows = torch.where(levels == level)[0]
            pooled = roi_align(each, regions[rows], self.output_size, scale, self.sampling_ratio, aligned=True)
            found[rows] = pooled.to(found.dtype)
        return found


def region_pooling(
    strides: Sequence[int], output_size: int, sampling_ratio: int, canonical_scale: int, aligned: bool
) -> RegionPooling:
    """The pooling of a head: `AlignedPooling`, or `RegionPooling` as torchvision's detectors have it."""
    kind = AlignedPooling if aligned else RegionPooling
    return kind(strides, output_size, sampling_ratio, canonical_scale)
