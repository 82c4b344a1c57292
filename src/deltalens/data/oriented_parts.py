"""From the quadrilaterals that annotations name to datasets: what is no object dropped and counted, or named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.data.assemble import assemble
from deltalens.data.dense_checks import Size, check_something_to_learn, look_at_all, sound
from deltalens.data.object_parts import Annotated, Findings, is_as_stored
from deltalens.data.options import ReadOptions
from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.quadrilaterals import areas_inside
from deltalens.data.splits import Splits

EMPTY = 1e-3  # square pixels: what has less area is no object


def oriented_splits(
    found: Mapping[str, Sequence[Annotated[OrientedObjects]]],
    class_names: Sequence[str],
    options: ReadOptions,
    origin: dict[str, Any] | None = None,
) -> Splits:
    """Splits for "oriented".

    Corners stay where they were annotated, also outside the picture. Objects that lie outside it as a whole, or have no
    area, are dropped; `origin` counts them. Raises ValueError for unreadable pictures, annotations for a picture of
    another size, more than 20 % of objects that would be dropped, and training pictures without any object.
    """
    findings = Findings()
    parts = {
        part: _part(list(pictures), len(class_names), options.skip_broken, findings) for part, pictures in found.items()
    }
    findings.check()
    splits = assemble(parts, class_names, options, {"task": "oriented"} | findings.facts() | (origin or {}), "oriented")
    check_something_to_learn(splits)
    return splits


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
