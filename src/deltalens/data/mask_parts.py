"""From pairs of pictures and masks to datasets: sizes and values checked, and what the values mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.data.assemble import assemble
from deltalens.data.class_lists import NO_CLASS, ClassList
from deltalens.data.dense_checks import (
    LARGE,
    Looked,
    Size,
    check_something_to_learn,
    in_threads,
    look,
    several,
    size_words,
    sound,
)
from deltalens.data.dense_items import IGNORED, MaskedImages, read_mask
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

Pair = tuple[Path, Path]  # a picture and its mask


@dataclass(frozen=True)
class Meaning:
    """What the values of masks stand for. classes: value -> class; ignored: values that stand for none, as 255 does
    where it is no class. All others are errors."""

    names: list[str]
    classes: Mapping[int, int]
    ignored: frozenset[int] = field(default=frozenset())

    @classmethod
    def of_list(cls, listed: ClassList, ignore_index: int | None = None) -> Meaning:
        """Values 0, 1, 2, ... or `listed.values` for the names; names such as "void" are ignored."""
        values = listed.values or range(len(listed.names))
        kept = [
            (int(value), name) for value, name in zip(values, listed.names, strict=True) if name.lower() not in NO_CLASS
        ]
        void = {int(value) for value, name in zip(values, listed.names, strict=True) if name.lower() in NO_CLASS}
        without = {int(each) for each in (listed.ignore_index, ignore_index) if each is not None and 0 <= each <= 255}
        kept = [(value, name) for value, name in kept if value not in without]
        beyond = [value for value, _ in kept if not 0 <= value <= 255]
        if beyond or len(kept) >= IGNORED:
            raise ValueError(f"{listed.where}: masks hold values 0 to 255 and at most 254 classes")
        names = [name for _, name in kept]
        return cls(names, {value: number for number, (value, _) in enumerate(kept)}, frozenset(void | without))

    @classmethod
    def of_numbers(cls, values: Sequence[int], ignore_index: int | None = None) -> Meaning:
        """The values 0 to the highest one but 255 are classes, called by their numbers."""
        found = [value for value in values if value not in (IGNORED, ignore_index)]
        kept = [value for value in range(max(found, default=-1) + 1) if value != ignore_index]
        ignored = frozenset() if ignore_index is None else frozenset({ignore_index})
        return cls([str(value) for value in kept], {value: number for number, value in enumerate(kept)}, ignored)

    def table(self) -> np.ndarray:
        """(256,) uint8: class of every value, 255 for those without one."""
        table = np.full(256, IGNORED, np.uint8)
        for value, label in self.classes.items():
            table[value] = label
        return table

    def unknown(self) -> np.ndarray:
        """(256,) bool: values that masks must not have."""
        known = [*self.classes, *self.ignored, IGNORED]
        return ~np.isin(np.arange(256), known)


@dataclass(frozen=True)
class _Pair:
    """What a pair was found to be."""

    picture: Looked
    present: np.ndarray  # (256,) bool: values of the mask
    as_stored: bool = False
    problem: str | None = None


def mask_splits(
    found: Mapping[str, Sequence[Pair]],
    meaning: Meaning | None,
    options: ReadOptions,
    origin: dict[str, Any] | None = None,
) -> Splits:
    """Splits for "segmentation" from the pairs of every part. meaning: None to take values as numbers of classes.

    Raises ValueError, naming the file, for unreadable pictures, masks that are not one channel of numbers, masks of
    another size than their picture, and values without a meaning.
    """
    looked: dict[str, list[_Pair]] = {}
    kept: dict[str, list[int]] = {}
    for part, pairs in found.items():
        looked[part] = in_threads(partial(_look, whole=len(pairs) <= LARGE), pairs)
        kept[part] = sound([p for p, _ in pairs], [each.picture for each in looked[part]], options.skip_broken)
        wrong = [problem for i in kept[part] if (problem := looked[part][i].problem)]
        if wrong:
            raise ValueError(several(wrong))
    if meaning is None:
        everywhere = np.any([looked[part][i].present for part in found for i in kept[part]], axis=0)
        meaning = Meaning.of_numbers(np.flatnonzero(everywhere).tolist(), options.ignore_index)
        if len(meaning.names) < 2:
            raise ValueError(
                f"the masks hold the values {np.flatnonzero(everywhere).tolist()}, and 255 is no class: segmentation "
                "needs two of them. Where 255 is one, say so in info.json: "
                '{"classes": ["background", "object"], "values": [0, 255]}'
            )
    table, unknown = meaning.table(), meaning.unknown()
    parts = {}
    for part, pairs in found.items():
        for i in kept[part]:
            strange = np.flatnonzero(looked[part][i].present & unknown)
            if len(strange):
                raise ValueError(
                    f"the mask {pairs[i][1]} has the value {strange[0]}, none of the {len(meaning.names)} "
                    f"classes ({_ranges(meaning.classes)}) and not ignored; see --ignore-index, or correct the names"
                )
        values = np.array([looked[part][i].present for i in kept[part]]).reshape(-1, 256).astype(bool)
        present = np.zeros((len(values), len(meaning.names)), bool)
        for value, label in meaning.classes.items():
            present[:, label] |= values[:, value]
        chosen = [pairs[i] for i in kept[part]]
        as_stored = [looked[part][i].as_stored for i in kept[part]]
        parts[part] = MaskedImages([p for p, _ in chosen], [m for _, m in chosen], table, present, as_stored)
    splits = assemble(parts, meaning.names, options, {"task": "segmentation"} | (origin or {}), "segmentation")
    check_something_to_learn(splits)
    return splits


def _look(pair: Pair, whole: bool) -> _Pair:
    path, mask = pair
    picture, present = look(path, whole), np.zeros(256, bool)
    if picture.problem:
        return _Pair(picture, present)
    try:
        values = read_mask(mask)
    except ValueError as error:
        return _Pair(picture, present, problem=str(error))
    frame = picture.frame_of(_size(values))
    if frame is None:
        sizes = f"{size_words(_size(values))} pixels and its picture {path} has {size_words(picture.upright)}"
        return _Pair(picture, present, problem=f"the mask {mask} has {sizes}")
    present |= np.bincount(values.reshape(-1), minlength=256) > 0
    return _Pair(picture, present, frame)


def _size(values: np.ndarray) -> Size:
    return values.shape[0], values.shape[1]


def _ranges(values: Mapping[int, int]) -> str:
    known = sorted(values)
    return (
        f"{known[0]} to {known[-1]}"
        if known == list(range(known[0], known[-1] + 1))
        else ", ".join(map(str, known[:12]))
    )
