"""Upright anchors as oriented boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from deltalens.backbones.dense.detector_parts import PyramidAnchors


class OrientedAnchors(PyramidAnchors):
    """The anchors of `PyramidAnchors` as (cx, cy, w, h, 0), (n, 5) for each image.

    Tall anchors keep angle 0 and w < h, which is not le90: so they are in mmrotate, which found detectors to be worse
    with -pi/2 and sides in order.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        upright = super().forward(image_list, feature_maps)
        anchors = upright_as_oriented(upright[0])
        return [anchors for _ in upright]


def upright_as_oriented(boxes: Tensor) -> Tensor:
    """(n, 4) corners -> (n, 5) with angle 0, whichever side is longer."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(low + high) / 2, high - low, torch.zeros_like(boxes[:, :1])], 1)
