"""Oriented boxes as changes of anchors, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from deltalens.models.oriented_boxes import Convention, as_convention

LARGEST_CHANGE = abs(math.log(16 / 1000))  # of a side's logarithm: 62.5 times longer or shorter
SMALLEST_SIDE = 0.1  # pixels, of what is encoded: a logarithm needs some length
LOWEST = {"le90": -math.pi / 2, "le135": -math.pi / 4}  # the angle where half a turn begins


@dataclass(frozen=True)
class OrientedCoder:
    """Codes (n, 5) of boxes (n, 5) on anchors or proposals (n, 5), as mmrotate's DeltaXYWHAOBBoxCoder has them.

        dx = ( cos(a') (x - x') + sin(a') (y - y')) / w'        the way to the centre, along the anchor's own sides
        dy = (-sin(a') (x - x') + cos(a') (y - y')) / h'        (proj_xy=False: (x - x') / w', (y - y') / h')
        dw = log(w / w'),   dh = log(h / h')
        da = (a - a') / (norm_factor pi)                        (norm_factor=None: a - a')
        codes = (dx, dy, dw, dh, da) / stds

    The anchor is (x', y', w', h', a'). edge_swap: of the four names of one rectangle, (w, h, a), (h, w, a + pi/2) and
    half a turn more, the one that is turned least against the anchor, so that da lies in [-pi/4, pi/4]. Without it the
    box keeps the name that it has in the `convention`, and a - a' is taken modulo half a turn, from -pi/2 on (le90) or
    -pi/4 on (le135); not under oc, whose angles end at pi/2 and do not go round.

    decode: the inverse, with |dw| and |dh| at most log(62.5), and boxes in the `convention`. What is encoded may have
    any of its names; sides below 0.1 pixels count as 0.1.

    Where mmrotate differs: it takes the turn modulo pi first, so that under oc a box is never renamed; its boxes come
    back in the convention under edge_swap only; it moves centres that are found outside the image to its border.

    Raises ValueError for another convention, a norm_factor or stds that are not positive.
    """

    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    edge_swap: bool = True
    proj_xy: bool = True
    convention: Convention = "le90"
    norm_factor: float | None = None

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {self.convention!r}")
        if self.norm_factor is not None and not self.norm_factor > 0:
            raise ValueError(f"norm_factor must be positive, or None for angles in radians, got {self.norm_factor}")
        if len(self.stds) != 5 or not min(self.stds) > 0:
            raise ValueError(f"stds must be five positive numbers, got {self.stds}")

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Codes (..., 5) of boxes (..., 5), by whichever of its names each box comes."""
        if not self.edge_swap:
            boxes = as_convention(boxes, self.convention)
        x, y, width, height, angle = boxes.unbind(-1)
        at_x, at_y, at_width, at_height, at_angle = anchors.unbind(-1)
        along, across = x - at_x, y - at_y
        if self.proj_xy:
            cos, sin = at_angle.cos(), at_angle.sin()
            along, across = cos * along + sin * across, cos * across - sin * along
        turn = angle - at_angle
        if self.edge_swap:
            quarters = torch.round(turn / (math.pi / 2))
            turn = turn - quarters * (math.pi / 2)
            swapped = quarters.remainder(2) == 1
            width, height = torch.where(swapped, height, width), torch.where(swapped, width, height)
        elif self.convention in LOWEST:
            lowest = LOWEST[self.convention]
            turn = (turn - lowest).remainder(math.pi) + lowest
        codes = (
            along / at_width,
            across / at_height,
            (width.clamp(min=SMALLEST_SIDE) / at_width).log(),
            (height.clamp(min=SMALLEST_SIDE) / at_height).log(),
            turn / self._turns(),
        )
        return torch.stack(codes, -1) / boxes.new_tensor(self.stds)

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 5) of codes (..., 5); differentiable."""
        dx, dy, dw, dh, da = (codes * codes.new_tensor(self.stds)).unbind(-1)
        at_x, at_y, at_width, at_height, at_angle = anchors.unbind(-1)
        along, across = dx * at_width, dy * at_height
        if self.proj_xy:
            cos, sin = at_angle.cos(), at_angle.sin()
            along, across = cos * along - sin * across, sin * along + cos * across
        boxes = (
            at_x + along,
            at_y + across,
            at_width * dw.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp(),
            at_height * dh.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp(),
            at_angle + da * self._turns(),
        )
        return as_convention(torch.stack(boxes, -1), self.convention)

    def _turns(self) -> float:
        return 1.0 if self.norm_factor is None else self.norm_factor * math.pi
