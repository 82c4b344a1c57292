"""Pictures with oriented boxes, as the four corners that were annotated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltalens.data.dense_items import DenseImages, Picture, listed
from deltalens.data.quadrilaterals import areas_of
from deltalens.data.tiling import Tile


@dataclass(frozen=True)
class OrientedObjects:
    """The n objects of one picture.

    corners: float32 (n, 4, 2), x and y in pixels from the upper left corner, as annotated: they need not be those of a
    rectangle, and may lie outside the picture. labels: int64 (n,). areas: float32 (n,) in square pixels, of the
    quadrilaterals. difficult: bool (n,).
    """

    corners: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    difficult: np.ndarray

    @classmethod
    def of(cls, corners: Any, labels: Any, difficult: Any = None) -> OrientedObjects:
        """From anything that numpy takes: corners (n, 4, 2) or (n, 8); flags are False where nothing is given."""
        corners = np.asarray(corners, np.float32).reshape(-1, 4, 2)
        flags = np.zeros(len(corners), bool) if difficult is None else np.asarray(difficult, bool).reshape(-1)
        areas = areas_of(corners).astype(np.float32)
        return cls(corners, np.asarray(labels, np.int64).reshape(-1), areas, flags)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, kept: np.ndarray) -> OrientedObjects:
        """Those at these indices, or where this mask says so."""
        return OrientedObjects(self.corners[kept], self.labels[kept], self.areas[kept], self.difficult[kept])


class OrientedImages(DenseImages):
    """Pictures with oriented boxes. Without a transform the truth is a dictionary of

    corners (float32 (n, 4, 2), x and y in pixels, as annotated), labels (int64 (n,)), image_id (an integer), area
    (float32 (n,)), iscrowd (zeros) and difficult (int64 (n,)). n is 0 for a picture without objects. The transforms of
    `deltalens.data.oriented_transforms` give boxes (n, 5) instead of corners.
    """

    task = "oriented"

    def __init__(
        self,
        pictures: Sequence[Picture],
        objects: Sequence[OrientedObjects],
        ids: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        classes: int,
        as_stored: Sequence[bool] = (),
        transform: Callable | None = None,
        mode: str = "RGB",
        collate: Callable = listed,
    ):
        self.pictures, self.objects, self.ids, self.sizes = list(pictures), list(objects), list(ids), list(sizes)
        self.classes = classes
        self.as_stored = list(as_stored) or [False] * len(self.pictures)
        self.transform, self.mode, self.collate = transform, mode, collate

    def __add__(self, other: OrientedImages) -> OrientedImages:  # type: ignore[override]
        """The items of both, with the transform of the first. Where both have a picture of the same id, the pictures of
        the second get ids behind those of the first."""
        ids, start = list(other.ids), max(self.ids, default=-1) + 1
        if set(ids) & set(self.ids):
            ids = list(range(start, start + len(ids)))
        return OrientedImages(
            self.pictures + other.pictures, self.objects + other.objects, self.ids + ids, self.sizes + other.sizes,
            self.classes, self.as_stored + other.as_stored, self.transform, self.mode, self.collate,
        )  # fmt: skip

    @property
    def labels(self) -> list[Any]:
        present = torch.zeros(len(self), self.classes, dtype=torch.int8)
        for row, objects in zip(present, self.objects, strict=True):
            row[torch.from_numpy(objects.labels)] = 1
        return list(present)

    def truth(self, index: int) -> dict[str, Any]:
        found = self.objects[index]
        return {
            "corners": torch.from_numpy(found.corners.copy()),
            "labels": torch.from_numpy(found.labels.copy()),
            "image_id": self.ids[index],
            "area": torch.from_numpy(found.areas.copy()),
            "iscrowd": torch.zeros(len(found), dtype=torch.int64),
            "difficult": torch.from_numpy(found.difficult.astype(np.int64)),
        }

    def tile(self, index: int) -> Tile | None:
        """Where one picture lies in a larger one, by the name of its file; None where that is not the name of a
        tile."""
        picture = self.pictures[index]
        return Tile.named(picture.stem) if isinstance(picture, Path) else None

    def subset(self, indices: Sequence[int]) -> OrientedImages:
        chosen = list(indices)
        return OrientedImages(
            [self.pictures[i] for i in chosen], [self.objects[i] for i in chosen], [self.ids[i] for i in chosen],
            [self.sizes[i] for i in chosen], self.classes, [self.as_stored[i] for i in chosen],
            self.transform, self.mode, self.collate,
        )  # fmt: skip

    def renumbered(self, index: Sequence[int], classes: int) -> OrientedImages:
        copy = self.subset(range(len(self)))
        numbers = np.asarray(index, np.int64)
        copy.objects = [replace(objects, labels=numbers[objects.labels]) for objects in self.objects]
        copy.classes = classes
        return copy
