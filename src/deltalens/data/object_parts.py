"""From the objects that annotations name to datasets: boxes put right, and all that cannot be put right named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from deltalens.data.assemble import assemble
from deltalens.data.dense_checks import (
    Looked,
    Size,
    check_something_to_learn,
    look_at_all,
    several,
    size_words,
    sound,
)
from deltalens.data.dense_items import ObjectImages, Objects
from deltalens.data.options import ReadOptions
from deltalens.data.outlines import problem
from deltalens.data.splits import Splits

Found = TypeVar("Found")
TOO_MANY = 0.2  # share of boxes that lie outside or are empty, above which they are taken to be of other pictures


@dataclass(frozen=True)
class Annotated(Generic[Found]):
    """One picture with its annotation. objects: of the picture's size (height, width). stated: the size that the
    annotation says. where: what messages call the annotation."""

    path: Path
    objects: Callable[[Size], Found]
    where: str
    id: int
    stated: Size | None = None


@dataclass
class Findings:
    """What was put right: how many boxes of which kind."""

    counts: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For `Splits.origin`."""
        return {"objects": self.counts["kept"]} | {
            name: self.counts[name] for name in ("clipped", "dropped", "without_mask") if self.counts[name]
        }

    def check(self) -> None:
        """ValueError where so many boxes lie outside their pictures that they cannot be meant for them."""
        dropped, kept = self.counts["dropped"], self.counts["kept"]
        if dropped > TOO_MANY * (dropped + kept):
            raise ValueError(
                f"{dropped} of {dropped + kept} boxes lie outside their pictures or are empty, so that they are not "
                f"those of these pictures, or not in this format: {several(self.outside)}"
            )


def object_splits(
    found: Mapping[str, Sequence[Annotated[Objects]]],
    class_names: Sequence[str],
    options: ReadOptions,
    masks: bool,
    origin: dict[str, Any] | None = None,
) -> Splits:
    """Splits for "detection", with `masks` for "instance".

    Boxes are clipped to their picture; those that lie outside or have no area are dropped, and so are with `masks`
    objects without an outline. `origin` counts them. Raises ValueError for unreadable pictures, annotations for a
    picture of another size, more than 20 % of boxes that would be dropped, and training pictures without any object.
    """
    findings = Findings()
    parts = {
        part: _part(list(pictures), len(class_names), options.skip_broken, masks, findings)
        for part, pictures in found.items()
    }
    findings.check()
    task = "instance" if masks else "detection"
    splits = assemble(parts, class_names, options, {"task": task} | findings.facts() | (origin or {}), task)
    check_something_to_learn(splits)
    return splits


def _part(
    pictures: list[Annotated[Objects]], classes: int, skip: bool, masks: bool, findings: Findings
) -> ObjectImages:
    paths = [each.path for each in pictures]
    looked = look_at_all(paths)
    kept = sound(paths, looked, skip)
    as_stored = [is_as_stored(pictures[i], looked[i]) for i in kept]
    sizes = [looked[i].stored if stored else looked[i].upright for i, stored in zip(kept, as_stored, strict=True)]
    objects = [_cleaned(pictures[i], size, masks, findings) for i, size in zip(kept, sizes, strict=True)]
    return ObjectImages(
        [paths[i] for i in kept], objects, [pictures[i].id for i in kept], sizes, classes, masks, as_stored
    )


def is_as_stored(picture: Annotated[Any], looked: Looked) -> bool:
    """Whether a picture is read as it is stored, because its annotation says that size. ValueError where it says
    another one."""
    frame = looked.frame_of(picture.stated)
    if frame is None:
        assert picture.stated is not None
        raise ValueError(
            f"{picture.where} is for a picture of {size_words(picture.stated)} pixels, and {picture.path} has "
            f"{size_words(looked.upright)}: give the pictures that were annotated, or scale the boxes with them"
        )
    return frame


def _cleaned(picture: Annotated[Objects], size: Size, masks: bool, findings: Findings) -> Objects:
    """The objects with boxes inside the picture."""
    height, width = size
    objects = picture.objects(size)
    if not np.isfinite(objects.boxes).all():
        raise ValueError(f"{picture.where} has a box with a coordinate that is no number")
    clipped = np.clip(objects.boxes, 0, np.array([width, height, width, height], np.float32))
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    whole = np.abs(clipped - objects.boxes).max(1, initial=0) <= 1e-3
    findings.counts["clipped"] += int((inside & ~whole).sum())
    findings.counts["dropped"] += int((~inside).sum())
    findings.outside += [f"{objects.boxes[i].tolist()} in {picture.where}" for i in np.flatnonzero(~inside)[:1]]
    if not masks:
        objects = replace(objects, outlines=())
    else:
        outlined = np.array([outline is not None and len(outline) > 0 for outline in objects.outlines], bool)
        findings.counts["without_mask"] += int((inside & ~outlined).sum())
        inside &= outlined
        for outline in objects.outlines:
            wrong = problem(outline, height, width)
            if wrong:
                raise ValueError(f"{picture.where} has {wrong}; the picture has {size_words(size)} pixels")
    findings.counts["kept"] += int(inside.sum())
    return replace(objects, boxes=clipped).take(inside)
