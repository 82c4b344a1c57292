"""Pictures of coloured bars at any angle, for oriented detectors on the tiny pyramid of `detectors`."""

from __future__ import annotations

import math

import torch
from detectors import COLOURS
from torch import Tensor


def target_of(boxes: list, labels: list) -> dict:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def picture_of(boxes: list, labels: list, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    """Grey noise with filled rectangles, whose rims are one pixel wide, so that angles show between the pixels."""
    image = 0.1 * torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    for (x, y, width, height, angle), label in zip(boxes, labels, strict=True):
        along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
        across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
        inside = (width / 2 - along.abs() + 0.5).clamp(0, 1) * (height / 2 - across.abs() + 0.5).clamp(0, 1)
        image = image * (1 - inside) + torch.tensor(COLOURS[label])[:, None, None] * inside
    return image


BARS = [[30.0, 34.0, 40.0, 12.0, 0.5]], [[34.0, 30.0, 36.0, 12.0, -1.1]]


def two_bars() -> tuple[list[Tensor], list[dict]]:
    """Two pictures with one bar each, of different angles and classes."""
    images = [picture_of(boxes, [label], seed=label) for label, boxes in enumerate(BARS)]
    return images, [target_of(boxes, [label]) for label, boxes in enumerate(BARS)]


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between the long sides of rectangles, at most 90."""
    turn = (first - second).abs().remainder(math.pi)
    return torch.rad2deg(torch.minimum(turn, math.pi - turn))
