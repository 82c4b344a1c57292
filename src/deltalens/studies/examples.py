"""Example pictures of a study: a few test images, and what every method says about them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from deltalens.data.clouds import Clouds
from deltalens.data.splits import Splits
from deltalens.lifecycle.atomic import atomic_path
from deltalens.studies.cloud_plots import cloud_picture
from deltalens.studies.study import folder_name
from deltalens.tasks import ClassificationTask

COUNT = 6
LONGEST = 160  # pixels of a picture's longer side
FOLDER = "pictures"


@dataclass(frozen=True)
class Example:
    """One image: its number in its part of the data, the true classes, and what a model says: (class, probability),
    the most probable class, or for images of several labels all that are probable enough."""

    index: int
    true: tuple[str, ...]
    said: tuple[tuple[str, float], ...]

    @property
    def right(self) -> bool:
        return {name for name, _ in self.said} == set(self.true)


@dataclass(frozen=True)
class Examples:
    """part: of the data, "test", or "val" where there is no test. images: how many it has."""

    part: str
    images: int
    shown: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for results.json."""
        shown = [{"index": e.index, "true": list(e.true), "said": [list(pair) for pair in e.said]} for e in self.shown]
        return {"part": self.part, "images": self.images, "shown": shown}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Examples:
        shown = (Example(e["index"], tuple(e["true"]), tuple(map(tuple, e["said"]))) for e in values["shown"])
        return cls(values["part"], values["images"], tuple(shown))


def shown_indices(images: int, count: int = COUNT) -> list[int]:
    """`count` numbers evenly spaced in 0 ... images - 1, all of them where there are fewer."""
    count = min(count, images)
    return [(2 * i + 1) * images // (2 * count) for i in range(count)]


@torch.inference_mode()
def examples_of(task: ClassificationTask, data: Splits) -> Examples | None:
    """What a task in eval mode says about the examples of its data; None where nothing is kept from training."""
    part = "test" if data.test is not None else "val"
    images: Dataset | None = getattr(data, part)
    if images is None or not len(images):
        return None
    indices = shown_indices(len(images))
    inputs, labels = default_collate([images[index] for index in indices])
    own = next(task.model.parameters())
    output = task((inputs.to(own.device, own.dtype), labels.to(own.device)))["output"]
    shown = [
        Example(index, _names(label, data.class_names), tuple(said))
        for index, label, said in zip(indices, labels, task.decode(output), strict=True)
    ]
    return Examples(part, len(images), tuple(shown))


def _names(label: torch.Tensor, class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of a label: a number, or 1 for each class that is there."""
    if label.dim() == 0:
        return (class_names[int(label)],)
    return tuple(name for name, there in zip(class_names, label.tolist(), strict=True) if there == 1)


# ------------------------------------------------------------------ pictures
def picture_file(study_folder: str | os.PathLike, dataset: str, index: int) -> Path:
    """Where the picture of an example lies: once for a dataset, whatever methods and backbones there are."""
    return Path(study_folder) / FOLDER / folder_name(dataset) / f"{index}.jpg"


def _picture(data: Any, index: int) -> Image.Image:
    """An image as it was read; of a cloud, a drawing."""
    if isinstance(data, Clouds):
        return Image.fromarray(cloud_picture(data.cloud(index), LONGEST))
    return data.image(index).convert("RGB")


def keep_pictures(study_folder: str | os.PathLike, dataset: str, data: Splits) -> None:
    """Write small pictures of the examples, where they are not there yet. data: as it was read, untransformed."""
    images = data.val if data.test is None else data.test
    for index in shown_indices(0 if images is None else len(images)):
        file = picture_file(study_folder, dataset, index)
        if not file.is_file():
            picture = _picture(images, index)
            picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            with atomic_path(file) as temporary:
                picture.save(temporary, "JPEG", quality=85)
