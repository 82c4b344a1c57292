"""Reads the datasets of a study file, and where they lie."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from deltalens.data.formats import PROTOCOLS
from deltalens.studies.study import DatasetEntry
from deltalens.studies.study_fields import SHARES, check_share, distinct_folders
from deltalens.studies.study_yaml import Document, Place
from deltalens.studies.training_amounts import AMOUNTS, read_amounts, with_amounts

TARGET_FIELDS = ("path", "format", "download")
FIELDS = (*TARGET_FIELDS, "min_crop", "hflip", "protocol", *AMOUNTS)


def read_datasets(
    document: Document, top: Mapping[str, Any], given: dict[str, str], seed: int
) -> dict[str, tuple[Any, ...]]:
    """The fields `datasets`, `targets` and `left_out` of a `Study`.

    given: name -> folder, in the place of, or beside, those of the file; "" is for all that have none. seed: of the
    split. Raises ValueError with line and field.
    """
    reader = _Reader(document, given)
    amounts = read_amounts(document, top, ())
    found: list[DatasetEntry] = []
    for entry, place, own in reader.entries(top, "datasets", FIELDS):
        chosen = read_amounts(document, own, place) or amounts
        if entry.protocol == "trainval" and any(amount.shots for amount in chosen):
            raise document.error(place, "shots are drawn for train and for val, and trainval would join them: use val")
        found += with_amounts(entry, chosen, seed)
    targets = tuple(entry for entry, *_ in reader.entries(top, "targets", TARGET_FIELDS))
    for name, folder in reader.others():
        found += with_amounts(DatasetEntry(name, folder), amounts, seed)
    if not found:
        raise ValueError(f"{document.path} names no datasets: give each as --data NAME=FOLDER")
    names = [dataset.name for dataset in found]
    distinct_folders(document, names, ("datasets",))
    return {"datasets": tuple(found), "targets": targets, "left_out": tuple(reader.left_out)}


class _Reader:
    def __init__(self, document: Document, given: dict[str, str]):
        self.document, self.given = document, given
        self.common = given.pop("", None)  # for those that have no folder
        self.some, self.waiting = bool(given), False
        self.left_out: list[str] = []

    def entries(self, top: Mapping[str, Any], field: str, fields: tuple[str, ...]):
        """(dataset, its place, its fields) of every entry that has a folder."""
        for name, said in self.document.mapping(top.get(field) or {}, (field,)).items():
            place: Place = (field, name)
            said = {"path": said} if isinstance(said, str) else {} if said is None else said
            own = self.document.mapping(said, place, fields)
            folder = self.given.pop(name, own.get("path"))
            if folder is None:
                folder, self.waiting = self.common, True
            if folder is None and self.some:
                self.left_out.append(name)
            elif folder is None:
                raise self.document.error(place, f"has no path; write one here or give --data {name}=FOLDER")
            else:
                yield self._entry(name, folder, own, place), place, own

    def _entry(self, name: str, folder: Any, own: Mapping[str, Any], place: Place) -> DatasetEntry:
        for key in SHARES:
            if own.get(key) is not None:
                check_share(self.document, own[key], (*place, key))
        protocol = own.get("protocol", "val")
        if protocol not in PROTOCOLS:
            raise self.document.error((*place, "protocol"), f"expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
        return DatasetEntry(
            name,
            self.document.text(folder, place),
            own.get("min_crop"),
            own.get("hflip"),
            self.document.text(own.get("format", "auto"), (*place, "format")),
            protocol,
            self.document.flag(own.get("download", False), (*place, "download")),
        )

    def others(self) -> list[tuple[str, str]]:
        """Folders that were given for no entry: datasets of their own. ValueError where they seem to be misspelt."""
        if self.common is not None and not self.waiting:
            raise ValueError(
                f"--data takes NAME=FOLDER, got {self.common!r}: no dataset of {self.document.path} waits for a folder"
            )
        for name in self.given:
            if near := difflib.get_close_matches(name, self.left_out, n=1):
                raise ValueError(
                    f"--data {name}=...: {self.document.path} has no dataset {name}; did you mean {near[0]}?"
                )
        return list(self.given.items())
