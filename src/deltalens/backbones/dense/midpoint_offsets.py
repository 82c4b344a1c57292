"""Oriented boxes as changes of upright anchors: the midpoint offsets of Oriented R-CNN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltalens.models.oriented_boxes import as_convention

LARGEST = math.log(1000 / 16)  # a side grows or shrinks 62.5 times at most, as in torchvision and mmdetection
LEVEL = 1e-4  # radians: a box this near to upright is upright. Corners of 1,000 pixels differ by 0.1


@dataclass(frozen=True)
class MidpointOffsetCoder:
    """Oriented box <-> six numbers that say how it differs from an upright anchor (Xie et al., 2021, section 3.1).

        w, h     sides of the upright rectangle around the box, x, y its centre
        alpha    how far the box's topmost corner lies to the right of the midpoint of that rectangle's top side
        beta     how far the box's rightmost corner lies below the midpoint of its right side
        dx = (x - x_a) / w_a    dy = (y - y_a) / h_a    dw = log(w / w_a)    dh = log(h / h_a)
        dalpha = alpha / w      dbeta = beta / h, both in [-1/2, 1/2]

    all divided by `stds`. The other two corners lie opposite, so any six numbers are a parallelogram. Its shorter
    diagonal is extended to the length of the longer one, which makes it a rectangle.

    An upright box has two topmost corners; of them the right one is taken, and below it the lower right one, so that
    dalpha = dbeta = 1/2. So are boxes turned by less than 1e-4 radians. mmrotate decides it for the two corners apart,
    within 0.1 pixels; a long box that is nearly upright then gets two corners at one place.

    Raises ValueError for stds that are not six positive numbers.
    """

    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.stds) != 6 or min(self.stds) <= 0:
            raise ValueError(f"stds must be six positive numbers, got {self.stds}")

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 5) and upright anchors (..., 4) as (left, top, right, bottom), sides above 0 -> (..., 6)."""
        x, y, width, height, angle = as_convention(boxes, "oc").unbind(-1)  # angles above 0, up to a quarter turn
        sine, cosine = torch.sin(angle), torch.cos(angle).clamp(min=0)
        level = angle < LEVEL
        outer_width, outer_height = width * cosine + height * sine, width * sine + height * cosine
        across = torch.where(level, outer_width, height * sine - width * cosine) / 2
        down = torch.where(level, outer_height, width * sine - height * cosine) / 2
        anchor_x, anchor_y, anchor_width, anchor_height = _centres_and_sides(anchors)
        changes = (
            (x - anchor_x) / anchor_width,
            (y - anchor_y) / anchor_height,
            torch.log(outer_width / anchor_width),
            torch.log(outer_height / anchor_height),
            across / outer_width,
            down / outer_height,
        )
        return torch.stack(changes, -1) / self._scales(boxes)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Changes (..., 6) of upright anchors (..., 4) -> boxes (..., 5) in le90.

        Offsets beyond 1/2 count as 1/2, and sides change by at most a factor of 62.5. Offsets (1/2, -1/2) are a line:
        one side of that box is 0.
        """
        right, below, wider, higher, across, down = (deltas * self._scales(deltas)).unbind(-1)
        anchor_x, anchor_y, anchor_width, anchor_height = _centres_and_sides(anchors.to(deltas.dtype))
        width = anchor_width * wider.clamp(-LARGEST, LARGEST).exp()
        height = anchor_height * higher.clamp(-LARGEST, LARGEST).exp()
        topmost = torch.stack((across.clamp(-0.5, 0.5) * width, -height / 2), -1)  # from the centre
        rightmost = torch.stack((width / 2, down.clamp(-0.5, 0.5) * height), -1)
        halves = topmost.norm(dim=-1, keepdim=True), rightmost.norm(dim=-1, keepdim=True)
        longer = torch.maximum(*halves)
        topmost, rightmost = topmost * (longer / halves[0]), rightmost * (longer / halves[1])
        first, second = rightmost - topmost, rightmost + topmost  # the two sides, at right angles
        lengths = first.norm(dim=-1), second.norm(dim=-1)
        turned = torch.atan2(-second[..., 0], second[..., 1])  # the direction of the first, told by the second
        angle = torch.where(lengths[0] > lengths[1], torch.atan2(first[..., 1], first[..., 0]), turned)
        centre = right * anchor_width + anchor_x, below * anchor_height + anchor_y
        return as_convention(torch.stack((*centre, *lengths, angle), -1), "le90")

    def _scales(self, like: Tensor) -> Tensor:
        return torch.tensor(self.stds, dtype=like.dtype, device=like.device)


def _centres_and_sides(anchors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left, top, right, bottom = anchors.unbind(-1)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
