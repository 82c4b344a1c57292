"""Large pictures with oriented boxes, looked at tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.tile_results import merged
from deltalens.data.tiling import Tile, check_tiling, windows_of
from deltalens.models.oriented_boxes import boxes_of
from deltalens.training.loaders import evaluation_loader

PICTURE = "picture"


@dataclass(frozen=True)
class Tiles:
    """How pictures are looked at: squares of `size` pixels, each `gap` pixels over the one before it. ValueError for a
    gap that is no part of the size."""

    size: int
    gap: int = 200

    def __post_init__(self) -> None:
        check_tiling(self.size, self.gap, (1.0,), 0.0)


def found_in_tiles(
    task: nn.Module, files: OrientedImages, index: int, tiles: Tiles, batch_size: int, device: Any
) -> dict[str, Tensor]:
    """What a task finds in one picture: "boxes" (n, 5) in the picture's pixels, "labels" (n,), "scores" (n,).

    Every tile goes through the transform of `files`, that of the test. Of two boxes of a class with an IoU above 0.1
    the one with the higher score is kept, as DOTA's development kit merges tiles (`deltalens.data.tile_results`).
    """
    pixels = np.asarray(files.image(index))
    windows = windows_of(*pixels.shape[:2], tiles.size, tiles.gap)
    cut = [pixels[window.top : window.bottom, window.left : window.right] for window in windows]
    nothing = [OrientedObjects.of([], []) for _ in cut]
    sizes = [each.shape[:2] for each in cut]
    parts = OrientedImages(
        cut, nothing, range(len(cut)), sizes, files.classes, transform=files.transform, mode=files.mode,
        collate=files.collate,
    )  # fmt: skip
    found = _each(task, parts, batch_size, device)
    names = [Tile(PICTURE, window.left, window.top).name for window in windows]
    return merged(zip(names, found, strict=True))[PICTURE]


def whole_target(files: OrientedImages, index: int, device: Any) -> dict[str, Any]:
    """The truth of one picture in its own pixels, with boxes (n, 5)."""
    truth = files.truth(index)
    truth["boxes"] = boxes_of(truth.pop("corners"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in truth.items()}


@torch.inference_mode()
def _each(task: nn.Module, parts: OrientedImages, batch_size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    for images, targets in evaluation_loader(parts, batch_size, 0):
        output = task.model([image.to(device) for image in images])  # type: ignore[operator]
        for each, target in zip(output, targets, strict=True):
            yield task.in_original(each, target)  # type: ignore[operator]
