"""A small Oriented R-CNN on a two-level pyramid, and pictures of one oriented bar each."""

from __future__ import annotations

import math

import torch
from detectors import COLOURS, TwoLevels
from torch import Tensor, nn

from deltalens.backbones.dense import oriented_rcnn

SMALL = {
    "channels": 16,
    "anchor_scale": 4.0,
    "proposals": 20,
    "proposals_train": 40,
    "sampled_regions": 32,
    "box_width": 32,
    "detections_per_image": 20,
}


def small_rcnn(num_classes: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return oriented_rcnn.on_pyramid(TwoLevels(), num_classes, {**SMALL, **options})


def oriented_target(boxes: list | Tensor, labels: list[int], **more) -> dict:
    found = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    none = torch.zeros(len(found), dtype=torch.int64)
    return {
        "boxes": found,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": 0,
        "area": found[:, 2] * found[:, 3],
        "iscrowd": none,
        "difficult": none.clone(),
        **more,
    }


def bar(box: list[float], label: int = 0, size: tuple[int, int] = (64, 64), seed: int = 0) -> tuple[Tensor, dict]:
    """Grey noise with a filled oriented rectangle (cx, cy, w, h, angle) in the colour of its class, and its target."""
    image = 0.2 * torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x, y, width, height, angle = box
    along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
    across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
    image[:, (along.abs() < width / 2) & (across.abs() < height / 2)] = torch.tensor(COLOURS[label])[:, None]
    return image, oriented_target([box], [label])


def bars(*boxes_and_labels: tuple[list[float], int]) -> tuple[list[Tensor], list[dict]]:
    pairs = [bar(box, label, seed=seed) for seed, (box, label) in enumerate(boxes_and_labels)]
    return [image for image, _ in pairs], [target for _, target in pairs]


TWO = (([30.0, 34.0, 36.0, 12.0, 0.5], 0), ([34.0, 30.0, 34.0, 14.0, -0.9], 2))


def random_boxes(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Oriented boxes (count, 5) in le90, sides from 2 to 102."""
    random = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    long, short = 2 + 100 * random[:, 2:4].amax(1), 2 + 100 * random[:, 2:4].amin(1)
    return torch.stack((200 * random[:, 0], 200 * random[:, 1], long, short, (random[:, 4] - 0.5) * math.pi), 1)
