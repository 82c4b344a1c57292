"""Amounts of training images in a study: `fractions` and `shots` make one dataset of each value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltalens.data.subsets import TrainingSubset
from deltalens.studies.study import DatasetEntry
from deltalens.studies.study_yaml import Document, Place

AMOUNTS = ("fractions", "shots")


@dataclass(frozen=True)
class Amount:
    """A share of the training images of every class, or so many of every class. named: whether datasets say it in their
    names."""

    fraction: float | None = None
    shots: int | None = None
    named: bool = True

    @property
    def text(self) -> str:
        """ "25%", "4 shots"."""
        if self.fraction is not None:
            return f"{100 * self.fraction:.6g}%"
        return f"{self.shots} shot{'' if self.shots == 1 else 's'}"


def read_amounts(document: Document, entry: Mapping[str, Any], place: Place) -> tuple[Amount, ...]:
    """The amounts that an entry's `fractions` or `shots` name, from the smallest; none where it has neither. A single
    number is one amount, and its dataset keeps its name.

    Raises ValueError for both at once, and for lists that are empty, repeat a value or hold impossible ones.
    """
    given = [name for name in AMOUNTS if entry.get(name) is not None]
    if len(given) > 1:
        raise document.error((*place, given[1]), "fractions and shots are two ways to say the same: give one of them")
    if not given:
        return ()
    name = given[0]
    values = entry[name]
    if not isinstance(values, list):
        return (replace(_amount(document, name, values, (*place, name)), named=False),)
    example = "[0.1, 0.25, 1]" if name == "fractions" else "[1, 2, 4]"
    if not values:
        raise document.error((*place, name), f"expected numbers such as {example}, got none")
    found: dict[str, Amount] = {}
    for index, value in enumerate(values):
        amount = _amount(document, name, value, (*place, name, index))
        if amount.text in found:
            raise document.error((*place, name, index), f"{value!r} stands here a second time")
        found[amount.text] = amount
    return tuple(sorted(found.values(), key=lambda amount: amount.fraction or amount.shots or 0))


def _amount(document: Document, name: str, value: Any, place: Place) -> Amount:
    if name == "shots":
        return Amount(shots=document.number(value, place, whole=True, above=0))
    document.number(value, place)
    try:
        return Amount(TrainingSubset(value).fraction)
    except ValueError as error:
        raise document.error(place, str(error)) from error


def with_amounts(entry: DatasetEntry, amounts: Iterable[Amount], seed: int) -> list[DatasetEntry]:
    """One dataset for each amount, "flowers@25%" or "flowers@4 shots"; the dataset itself where there are none. seed:
    of the study's split, which draws fractions; shots are drawn by the seed of each run."""
    found = [
        replace(
            entry,
            name=f"{entry.name}@{amount.text}" if amount.named else entry.name,
            origin=entry.name if amount.named else None,
            subset=TrainingSubset(amount.fraction, seed),
            shots=amount.shots,
        )
        for amount in amounts
    ]
    return found or [entry]
