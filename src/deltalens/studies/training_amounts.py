"""Amounts of training images in a study: `fractions` and `shots` make one dataset of each value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from deltalens.data.subsets import TrainingSubset
from deltalens.studies.study import DatasetEntry
from deltalens.studies.study_yaml import Document, Place

AMOUNTS = ("fractions", "shots")


def read_amounts(document: Document, entry: Mapping[str, Any], place: Place, seed: int) -> tuple[TrainingSubset, ...]:
    """The subsets that an entry's `fractions` or `shots` name, from the smallest; none where it has neither.

    Raises ValueError for both at once, and for lists that are empty, repeat a value or hold impossible ones.
    """
    given = [name for name in AMOUNTS if entry.get(name) is not None]
    if len(given) > 1:
        raise document.error((*place, given[1]), "fractions and shots are two ways to say the same: give one of them")
    if not given:
        return ()
    name = given[0]
    values = entry[name]
    example = "[0.1, 0.25, 1]" if name == "fractions" else "[1, 2, 4]"
    if not isinstance(values, list) or not values:
        raise document.error((*place, name), f"expected a list of numbers such as {example}, got {values!r}")
    found: dict[str, TrainingSubset] = {}
    for index, value in enumerate(values):
        here = (*place, name, index)
        document.number(value, here, whole=name == "shots")
        try:
            subset = TrainingSubset(seed=seed, **{name.removesuffix("s") if name == "fractions" else name: value})
        except ValueError as error:
            raise document.error(here, str(error)) from error
        if subset.text in found:
            raise document.error(here, f"{value!r} stands here a second time")
        found[subset.text] = subset
    return tuple(sorted(found.values(), key=lambda subset: subset.fraction or subset.shots or 0))


def with_amounts(entry: DatasetEntry, amounts: Iterable[TrainingSubset]) -> list[DatasetEntry]:
    """One dataset for each amount, "flowers@25%" or "flowers@4 shots"; the dataset itself where there are none."""
    found = [replace(entry, name=f"{entry.name}@{subset.text}", origin=entry.name, subset=subset) for subset in amounts]
    return found or [entry]
