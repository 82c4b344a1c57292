"""Pictures with a truth for every pixel or for every object: the datasets of dense tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from deltalens.data.image_folder import read_image
from deltalens.data.outlines import Outline, filled

IGNORED = 255  # of a mask: pixels that count neither in the loss nor in metrics
Picture = Path | np.ndarray  # a file, or uint8 (H, W, 3) in memory


def listed(items: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """A batch of images of any sizes: (list of images, list of truths)."""
    return [image for image, _ in items], [truth for _, truth in items]


def stacked(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of images and masks of one size: (B, 3, H, W) and (B, H, W)."""
    return torch.stack([image for image, _ in items]), torch.stack([mask for _, mask in items])


class DenseImages(Dataset):
    """Pictures, each with a truth. Items are `transform(image, truth)`; without a transform PIL image and truth.

    collate makes a batch of items. as_stored: of each picture, whether it is read without turning it as its EXIF data
    says, because its annotations are in that frame. labels: of each picture int8 (classes,), 1 for what is in it.
    """

    task: ClassVar[str]
    pictures: list[Picture]
    as_stored: list[bool]
    transform: Callable | None
    mode: str
    collate: Callable

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, truth = self.image(index), self.truth(index)
        return self.transform(image, truth) if self.transform else (image, truth)

    def image(self, index: int) -> Image.Image:
        """One picture as it is read, in `mode`, without the transform."""
        picture = self.pictures[index]
        if isinstance(picture, np.ndarray):
            return Image.fromarray(picture).convert(self.mode)
        return read_image(picture, self.mode, upright=not self.as_stored[index])

    def name(self, index: int) -> str:
        """What messages and outputs call one picture."""
        picture = self.pictures[index]
        return f"picture {index}" if isinstance(picture, np.ndarray) else str(picture)

    @property
    def labels(self) -> list[Any]:
        raise NotImplementedError

    def truth(self, index: int) -> Any:
        """What is to be found in one picture, without the transform."""
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Self:
        """The items at these indices, as a dataset of their own."""
        raise NotImplementedError

    def renumbered(self, index: Sequence[int], classes: int) -> Self:
        """The same with class i called index[i], of so many classes."""
        raise NotImplementedError

    def in_memory(self, limit: int) -> Self:
        """A copy with decoded pictures where all of them take at most `limit` bytes; otherwise itself."""
        kept: list[Picture] = []
        size = 0
        for i in range(len(self)):
            pixels = np.asarray(self.image(i).convert("RGB"))
            kept.append(pixels)
            size += pixels.nbytes
            if size > limit or size * len(self) > 4 * limit * len(kept):  # the second finds big pictures at once
                return self
        copy = self.subset(range(len(self)))
        copy.pictures = kept
        return copy


class MaskedImages(DenseImages):
    """Pictures with a class for every pixel. The truth is an int64 mask (H, W) of classes from 0, and 255 for ignored.

    masks: files, or uint8 arrays, of values that `table` (256,) translates to classes and 255. present: (n, classes)
    flags.
    """

    task = "segmentation"

    def __init__(
        self,
        pictures: Sequence[Picture],
        masks: Sequence[Picture],
        table: np.ndarray,
        present: np.ndarray,
        as_stored: Sequence[bool] = (),
        transform: Callable | None = None,
        mode: str = "RGB",
        collate: Callable = listed,
    ):
        self.pictures, self.masks, self.table = list(pictures), list(masks), table
        self.present = np.asarray(present, np.int8)
        self.as_stored = list(as_stored) or [False] * len(self.pictures)
        self.transform, self.mode, self.collate = transform, mode, collate

    def __add__(self, other: MaskedImages) -> MaskedImages:  # type: ignore[override]
        """The items of both, with the transform of the first. ValueError where their masks mean other classes."""
        if not np.array_equal(self.table, other.table):
            raise ValueError("the masks of the two parts are numbered in different ways")
        present = np.concatenate([self.present, other.present])
        return MaskedImages(
            self.pictures + other.pictures, self.masks + other.masks, self.table, present,
            self.as_stored + other.as_stored, self.transform, self.mode, self.collate,
        )  # fmt: skip

    @property
    def labels(self) -> list[Any]:
        return list(torch.from_numpy(self.present))

    def truth(self, index: int) -> tv_tensors.Mask:
        mask = self.masks[index]
        values = mask if isinstance(mask, np.ndarray) else read_mask(mask)
        return tv_tensors.Mask(torch.from_numpy(self.table[values].astype(np.int64)))

    def subset(self, indices: Sequence[int]) -> MaskedImages:
        chosen = list(indices)
        return MaskedImages(
            [self.pictures[i] for i in chosen], [self.masks[i] for i in chosen], self.table, self.present[chosen],
            [self.as_stored[i] for i in chosen], self.transform, self.mode, self.collate,
        )  # fmt: skip

    def renumbered(self, index: Sequence[int], classes: int) -> MaskedImages:
        copy = self.subset(range(len(self)))
        numbers = np.full(256, IGNORED, np.uint8)
        numbers[: len(index)] = index
        copy.table = numbers[self.table]
        copy.present = np.zeros((len(self), classes), np.int8)
        copy.present[:, list(index)] = self.present
        return copy


@dataclass(frozen=True)
class Objects:
    """The n objects of one picture.

    boxes: float32 (n, 4), x1, y1, x2, y2 in pixels from the upper left corner. labels: int64 (n,). areas: float32 (n,)
    in square pixels, by which COCO's metric calls objects small or large. crowd, difficult: bool (n,). outlines: n of
    them, for masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    outlines: tuple[Outline, ...] = field(default=())

    @classmethod
    def of(
        cls, boxes: Any, labels: Any, areas: Any = None, crowd: Any = None, difficult: Any = None, outlines: Any = ()
    ) -> Objects:
        """From anything that numpy takes; areas are those of the boxes, and flags False, where nothing is given."""
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        plain = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        none = np.zeros(len(boxes), bool)
        return cls(
            boxes,
            np.asarray(labels, np.int64).reshape(-1),
            plain if areas is None else np.asarray(areas, np.float32).reshape(-1),
            none if crowd is None else np.asarray(crowd, bool).reshape(-1),
            none if difficult is None else np.asarray(difficult, bool).reshape(-1),
            tuple(outlines),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, kept: np.ndarray) -> Objects:
        """Those at these indices, or where this mask says so."""
        chosen = np.arange(len(self))[kept]
        rows = (self.boxes[chosen], self.labels[chosen], self.areas[chosen], self.crowd[chosen], self.difficult[chosen])
        return Objects(*rows, tuple(self.outlines[i] for i in chosen) if self.outlines else ())


class ObjectImages(DenseImages):
    """Pictures with boxes, and with `masks` outlines, of objects. The truth is a dictionary of

    boxes (float32 (n, 4), x1, y1, x2, y2 in pixels), labels (int64 (n,)), image_id (an integer), area (float32 (n,)),
    iscrowd and difficult (int64 (n,)), and with masks: masks (uint8 (n, H, W)). n is 0 for a picture without objects.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        objects: Sequence[Objects],
        ids: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        classes: int,
        masks: bool = False,
        as_stored: Sequence[bool] = (),
        transform: Callable | None = None,
        mode: str = "RGB",
        collate: Callable = listed,
    ):
        self.pictures, self.objects, self.ids, self.sizes = list(pictures), list(objects), list(ids), list(sizes)
        self.classes, self.masks = classes, masks
        self.as_stored = list(as_stored) or [False] * len(self.pictures)
        self.transform, self.mode, self.collate = transform, mode, collate

    @property
    def task(self) -> str:  # type: ignore[override]
        return "instance" if self.masks else "detection"

    def __add__(self, other: ObjectImages) -> ObjectImages:  # type: ignore[override]
        """The items of both, with the transform of the first. Where both have a picture of the same id, the pictures of
        the second get ids behind those of the first."""
        ids, start = list(other.ids), max(self.ids, default=-1) + 1
        if set(ids) & set(self.ids):
            ids = list(range(start, start + len(ids)))
        return ObjectImages(
            self.pictures + other.pictures, self.objects + other.objects, self.ids + ids, self.sizes + other.sizes,
            self.classes, self.masks, self.as_stored + other.as_stored, self.transform, self.mode, self.collate,
        )  # fmt: skip

    @property
    def labels(self) -> list[Any]:
        present = torch.zeros(len(self), self.classes, dtype=torch.int8)
        for row, objects in zip(present, self.objects, strict=True):
            row[torch.from_numpy(objects.labels)] = 1
        return list(present)

    def truth(self, index: int) -> dict[str, Any]:
        found, (height, width) = self.objects[index], self.sizes[index]
        boxes = torch.from_numpy(found.boxes.copy())
        truth: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(found.labels.copy()),
            "image_id": self.ids[index],
            "area": torch.from_numpy(found.areas.copy()),
            "iscrowd": torch.from_numpy(found.crowd.astype(np.int64)),
            "difficult": torch.from_numpy(found.difficult.astype(np.int64)),
        }
        if self.masks:
            try:
                masks = filled(found.outlines, height, width)
            except ValueError as error:
                raise ValueError(f"cannot read the masks of {self.name(index)}: {error}") from error
            truth["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return truth

    def subset(self, indices: Sequence[int]) -> ObjectImages:
        chosen = list(indices)
        return ObjectImages(
            [self.pictures[i] for i in chosen], [self.objects[i] for i in chosen], [self.ids[i] for i in chosen],
            [self.sizes[i] for i in chosen], self.classes, self.masks, [self.as_stored[i] for i in chosen],
            self.transform, self.mode, self.collate,
        )  # fmt: skip

    def renumbered(self, index: Sequence[int], classes: int) -> ObjectImages:
        copy = self.subset(range(len(self)))
        numbers = np.asarray(index, np.int64)
        copy.objects = [replace(objects, labels=numbers[objects.labels]) for objects in self.objects]
        copy.classes = classes
        return copy


def read_mask(path: Path) -> np.ndarray:
    """The values of a mask, uint8 (H, W), in palette files the indices. ValueError for other than one channel of
    numbers up to 255."""
    try:
        with Image.open(path) as image:
            if image.mode in ("L", "P", "1"):
                return np.asarray(image).astype(np.uint8)
            if not image.mode.startswith("I"):
                raise ValueError(f"it is {image.mode}, and a mask has one channel of class numbers")
            values = np.asarray(image)
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"the mask {path} has the value {values.max()}; class numbers go up to 255")
    return values.astype(np.uint8)
