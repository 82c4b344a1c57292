"""The second view of H2RBox-v2: the same images turned or flipped, with their boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate


@dataclass(frozen=True)
class SecondView:
    """Images turned by `turn` (radians, clockwise on the screen) about their centre, or, with turn None, flipped upside
    down."""

    turn: float | None

    def of_images(self, images: Tensor) -> Tensor:
        """(B, C, H, W), with zeros where nothing is seen. Turned images are interpolated linearly; the authors take the
        nearest pixels."""
        if self.turn is None:
            return images.flip(-2)
        return rotate(images, -math.degrees(self.turn), InterpolationMode.BILINEAR)

    def of_boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes (n, 5) of an image of the size (height, width), turned or flipped with it."""
        height, width = size
        x, y, angle = boxes[:, 0], boxes[:, 1], boxes[:, 4]
        if self.turn is None:
            return torch.stack([x, height - y, boxes[:, 2], boxes[:, 3], -angle], 1)
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        x, y = x - width / 2, y - height / 2
        turned = width / 2 + cos * x - sin * y, height / 2 + sin * x + cos * y
        return torch.stack([*turned, boxes[:, 2], boxes[:, 3], angle + self.turn], 1)

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """How far angles (n,) of the second view are from those that the first view's become, in [-pi/2, pi/2)."""
        expected = -first if self.turn is None else first + self.turn
        return (second - expected + math.pi / 2).remainder(math.pi) - math.pi / 2


def draw_view(turned: float, turns: tuple[float, float]) -> SecondView:
    """A view that is turned with the probability `turned`, by an angle between both `turns` (in half turns), or else
    flipped. Drawn from torch's generator."""
    chance, place = torch.rand(2).tolist()
    if chance >= turned:
        return SecondView(None)
    return SecondView(math.pi * (turns[0] + place * (turns[1] - turns[0])))
