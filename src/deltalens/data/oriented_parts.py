"""From the quadrilaterals that annotations name to datasets: what is no object dropped and counted, or named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltalens.data.assemble import assemble
from deltalens.data.dense_checks import Size, check_something_to_learn, look_at_all, sound
from deltalens.data.object_parts import Annotated, Findings, is_as_stored
from deltalens.data.options import ReadOptions
from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.quadrilaterals import areas_inside
from deltalens.data.splits import Splits, strata, stratified_split

EMPTY = 1e-3  # square pixels: what has less area is no object


def oriented_splits(
    found: Mapping[str, Sequence[Annotated[OrientedObjects]]],
    class_names: Sequence[str],
    options: ReadOptions,
    origin: dict[str, Any] | None = None,
) -> Splits:
    """Splits for "oriented".

    Corners stay where they were annotated, also outside the picture. Objects that lie outside it as a whole, or have no
    area, are dropped; `origin` counts them. Where parts are drawn by seed, all tiles of one picture come into one part.
    Raises ValueError for unreadable pictures, annotations for a picture of another size, more than 20 % of objects that
    would be dropped, and training pictures without any object.
    """
    findings = Findings()
    parts = {
        part: _part(list(pictures), len(class_names), options.skip_broken, findings) for part, pictures in found.items()
    }
    findings.check()
    parts, drawn = _drawn_by_source(parts, options)
    splits = assemble(
        parts, class_names, options, {"task": "oriented"} | findings.facts() | drawn | (origin or {}), "oriented"
    )
    check_something_to_learn(splits)
    return splits


def _drawn_by_source(
    parts: dict[str, OrientedImages], options: ReadOptions
) -> tuple[dict[str, OrientedImages], dict[str, Any]]:
    """The parts with val, and test of "all", drawn by seed so that all tiles of a picture are in one part; with facts
    for the origin. As they are where there is a val, or no two pictures are tiles of one, which `assemble` then draws.
    """
    name = "all" if "all" in parts else "train"
    if "val" in parts or name not in parts:
        return parts, {}
    whole = parts[name]
    members: dict[str, list[int]] = defaultdict(list)
    for index in range(len(whole)):
        tile = whole.tile(index)
        members[whole.name(index) if tile is None else tile.source].append(index)
    if len(members) == len(whole):
        return parts, {}
    labels = whole.labels
    of_sources = [torch.stack([labels[i] for i in each]).amax(0) for each in members.values()]
    fractions = (options.val_fraction, options.test_fraction) if name == "all" else (options.val_fraction,)
    drawn = stratified_split(strata(of_sources), fractions, options.seed)
    groups = list(members.values())
    taken = [whole.subset(sorted(i for group in each for i in groups[group])) for each in drawn]
    facts = {"drawn": "by source picture", "seed": options.seed, "val_fraction": options.val_fraction}
    facts |= {"test_fraction": options.test_fraction} if name == "all" else {"val": "split off train"}
    return {key: part for key, part in parts.items() if key != name} | dict(
        zip(("train", "val", "test"), taken, strict=False)
    ), facts


def class_numbers(found: Sequence[str], names: Sequence[str], file: Path) -> list[int]:
    """The labels of these class names. ValueError for one that is not among the names."""
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in found if name not in numbers]
    if unknown:
        raise ValueError(
            f"{file} has an object of the unknown class {unknown[0]!r}; the classes of train and val, or of the "
            f"file of names, are {', '.join(names[:8])}{'...' if len(names) > 8 else ''}"
        )
    return [numbers[name] for name in found]


def _part(pictures: list[Annotated[OrientedObjects]], classes: int, skip: bool, findings: Findings) -> OrientedImages:
    paths = [each.path for each in pictures]
    looked = look_at_all(paths)
    kept = sound(paths, looked, skip)
    as_stored = [is_as_stored(pictures[i], looked[i]) for i in kept]
    sizes = [looked[i].stored if stored else looked[i].upright for i, stored in zip(kept, as_stored, strict=True)]
    objects = [_cleaned(pictures[i], size, findings) for i, size in zip(kept, sizes, strict=True)]
    return OrientedImages([paths[i] for i in kept], objects, [pictures[i].id for i in kept], sizes, classes, as_stored)


def _cleaned(picture: Annotated[OrientedObjects], size: Size, findings: Findings) -> OrientedObjects:
    """The objects of which something lies in the picture."""
    height, width = size
    objects = picture.objects(size)
    if not np.isfinite(objects.corners).all():
        raise ValueError(f"{picture.where} has a corner that is no number")
    inside = areas_inside(objects.corners, (0, 0, width, height)) > EMPTY
    findings.counts["dropped"] += int((~inside).sum())
    findings.outside += [
        f"{objects.corners[i].reshape(-1).tolist()} in {picture.where}" for i in np.flatnonzero(~inside)[:1]
    ]
    findings.counts["kept"] += int(inside.sum())
    return objects.take(inside)
