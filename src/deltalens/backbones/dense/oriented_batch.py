"""Batches of images with oriented boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from deltalens.backbones.dense.detector_parts import PaddedBatch
from deltalens.models.oriented_boxes import as_convention


class OrientedBatch(PaddedBatch):
    """`PaddedBatch` whose boxes are oriented ones (n, 5)."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None):
        if not self.resizes:
            return image, target
        boxless = None if target is None else {**target, "boxes": target["boxes"].new_zeros(0, 4)}
        resized, _ = super().resize(image, boxless)
        if target is not None:
            target = {**target, "boxes": resized_boxes(target["boxes"], image.shape[-2:], resized.shape[-2:])}
        return resized, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        sizes = zip(result, image_shapes, original_image_sizes, strict=True)
        return [{**found, "boxes": resized_boxes(found["boxes"], now, before)} for found, now, before in sizes]


def resized_boxes(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Oriented boxes (n, 5) of an image of size (H, W) `before`, in the image as it is `after`. le90.

    Height and width are rounded to pixels apart, so that a rectangle becomes a parallelogram, off by less than a pixel.
    The box has the direction of its first side, and the lengths of both.
    """
    if tuple(before) == tuple(after):
        return boxes
    x, y, width, height, angle = boxes.unbind(-1)
    down, across = after[0] / before[0], after[1] / before[1]
    cosine, sine = torch.cos(angle), torch.sin(angle)
    first, second = torch.hypot(across * cosine, down * sine), torch.hypot(across * sine, down * cosine)
    turned = torch.atan2(down * sine, across * cosine)
    return as_convention(torch.stack((x * across, y * down, width * first, height * second, turned), -1), "le90")
