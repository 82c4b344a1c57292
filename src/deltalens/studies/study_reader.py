"""Reads a study file into a checked `Study`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from deltalens.data.formats import PROTOCOLS
from deltalens.data.splits import stratified_split
from deltalens.methods import Method, make_config
from deltalens.studies.study import (
    OWN_RATE,
    BackboneEntry,
    DatasetEntry,
    Split,
    Study,
    Training,
    Variant,
    folder_name,
)
from deltalens.studies.study_yaml import Document, Place
from deltalens.studies.training_amounts import AMOUNTS, read_amounts, with_amounts

BACKBONE_FIELDS = ("model", "label", "img_size", "checkpoint", "pretrained", "options")
DATASET_FIELDS = ("path", "min_crop", "hflip", "format", "protocol", "download", *AMOUNTS)
FIELDS = ("title", "backbones", "datasets", "methods", "seeds", "training", "split", "lr", "keep_adapters", "x_title")
FIELDS += ("reference", "scatter", *AMOUNTS)


def read_study(path: str | os.PathLike, datasets: Mapping[str, str] | None = None) -> Study:
    """Read and check a study file. datasets: name -> folder, in the place of, or beside, those of the file.

    Raises ValueError that names line and field and says what is allowed, FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study file at {path}")
    return _Reader(Document(path)).study(dict(datasets or {}))


class _Reader:
    """Makes a `Study` of a document."""

    def __init__(self, document: Document):
        self.document = document

    def study(self, given: dict[str, str]) -> Study:
        top = self.document.mapping(self.document.content, (), FIELDS)
        for name in ("backbones", "methods"):
            if not top.get(name):
                raise self.document.error((), f"{name} is missing; a study has {', '.join(FIELDS)}")
        rates, fixed = self._rates(top.get("lr"))
        split = self._split(top.get("split") or {})
        study = Study(
            title=self.document.text(top.get("title", self.document.path.stem), ("title",)),
            backbones=self._backbones(top["backbones"]),
            variants=self._variants(top["methods"]),
            seeds=self._seeds(top.get("seeds", [0, 1, 2])),
            training=self._training(top.get("training") or {}),
            split=split,
            rates=rates,
            fixed_rate=fixed,
            keep_adapters=self.document.flag(top.get("keep_adapters", True), ("keep_adapters",)),
            x_title=self.document.text(top.get("x_title", "x"), ("x_title",)),
            datasets=self._datasets(top.get("datasets") or {}, given, top, split.seed),
            reference=top.get("reference"),
            scatter=tuple(top["scatter"]) if isinstance(top.get("scatter"), list) else top.get("scatter"),
        )
        self._check_report(study)
        return study

    def _check_report(self, study: Study) -> None:
        """The fields that name rows and datasets."""
        labels, names = [v.label for v in study.variants], [d.name for d in study.datasets]
        if study.reference is not None and study.reference not in labels:
            raise self.document.error(("reference",), f"expected a row: {', '.join(labels)}; got {study.reference!r}")
        pair = study.scatter
        if pair is not None and not (
            isinstance(pair, tuple) and len(pair) == 2 and pair[0] != pair[1] and all(each in names for each in pair)
        ):
            shown = list(pair) if isinstance(pair, tuple) else pair
            raise self.document.error(("scatter",), f"expected two of the datasets {', '.join(names)}; got {shown!r}")

    # ------------------------------------------------------------------ what is compared
    def _backbones(self, value: Any) -> tuple[BackboneEntry, ...]:
        entries = value if isinstance(value, list) else [value]
        found: dict[str, BackboneEntry] = {}
        for index, entry in enumerate(entries):
            place: Place = ("backbones", index) if isinstance(value, list) else ("backbones",)
            if isinstance(entry, str):
                entry = {"model": entry}
            entry = self.document.mapping(entry, place, BACKBONE_FIELDS)
            model = self.document.text(entry.get("model"), (*place, "model"))
            size = entry.get("img_size")
            if size is not None:
                self.document.number(size, (*place, "img_size"), whole=True, above=0)
            label = entry.get("label") or model.rstrip("/").rpartition("/")[2] + (f"@{size}" if size else "")
            pretrained = self.document.flag(entry.get("pretrained", True), (*place, "pretrained"))
            if label in found:
                raise self.document.error(place, f"two backbones are called {label!r}; give one a label")
            options = self.document.mapping(entry.get("options") or {}, (*place, "options"))
            found[label] = BackboneEntry(label, model, size, entry.get("checkpoint"), pretrained, options)
        self._distinct_folders(found, ("backbones",))
        return tuple(found.values())

    def _datasets(
        self, value: Any, given: dict[str, str], top: Mapping[str, Any], seed: int
    ) -> tuple[DatasetEntry, ...]:
        amounts = read_amounts(self.document, top, (), seed)
        entries = self.document.mapping(value, ("datasets",))
        found: list[DatasetEntry] = []
        for name, entry in entries.items():
            place: Place = ("datasets", name)
            entry = {"path": entry} if isinstance(entry, str) else {} if entry is None else entry
            entry = self.document.mapping(entry, place, DATASET_FIELDS)
            folder = given.pop(name, entry.get("path"))
            if folder is None:
                raise self.document.error(place, f"has no path; write one here or give --data {name}=FOLDER")
            for key in ("min_crop", "hflip"):
                if entry.get(key) is not None:
                    self._share(entry[key], (*place, key))
            protocol = entry.get("protocol", "val")
            if protocol not in PROTOCOLS:
                raise self.document.error((*place, "protocol"), f"expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
            whole = DatasetEntry(
                name,
                self.document.text(folder, place),
                entry.get("min_crop"),
                entry.get("hflip"),
                self.document.text(entry.get("format", "auto"), (*place, "format")),
                protocol,
                self.document.flag(entry.get("download", False), (*place, "download")),
            )
            found += with_amounts(whole, read_amounts(self.document, entry, place, seed) or amounts)
        for name, folder in given.items():
            found += with_amounts(DatasetEntry(name, folder), amounts)
        if not found:
            raise ValueError(f"{self.document.path} names no datasets: give each as --data NAME=FOLDER")
        self._distinct_folders([dataset.name for dataset in found], ("datasets",))
        return tuple(found)

    def _variants(self, value: Any) -> tuple[Variant, ...]:
        entries = self.document.mapping(value, ("methods",))
        found = {label: self._variant(label, entry, ("methods", label)) for label, entry in entries.items()}
        self._distinct_folders(found, ("methods",))
        return tuple(found.values())

    def _variant(self, label: str, entry: Any, place: Place) -> Variant:
        own: dict[str, Any] = {}
        if isinstance(entry, dict):
            own = {key: entry[key] for key in ("x", "curve", "lr") if entry.get(key) is not None}
            entry = {key: value for key, value in entry.items() if key not in ("x", "curve", "lr")}
            if "methods" in entry:
                entry = self.document.mapping(entry, place, ("methods", "x", "curve", "lr"))["methods"]
                place = (*place, "methods")
        if "x" in own:
            self.document.number(own["x"], (*place, "x"))
        if "lr" in own:
            self.document.number(own["lr"], (*place, "lr"), above=0)
        if own.get("curve") is not None and "x" not in own:
            raise self.document.error((*place, "curve"), "a row of a curve needs x, a number")
        several = entry if isinstance(entry, list) else [entry]
        if not several:
            raise self.document.error(place, "names no method")
        methods = [
            self._method(each, (*place, index) if isinstance(entry, list) else place)
            for index, each in enumerate(several)
        ]
        return Variant(label, tuple(methods), **own)

    def _method(self, entry: Any, place: Place) -> Method:
        if isinstance(entry, str):
            entry = {"method": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise self.document.error(
                place, f"expected a method's name, or a mapping with 'method' and its settings, got {entry!r}"
            )
        settings = {str(key): value for key, value in entry.items() if key != "method"}
        try:
            return make_config(entry["method"], **settings)
        except (TypeError, ValueError) as error:
            named = {key: re.search(rf"\b{re.escape(key)}\b", str(error)) for key in settings}
            first = min((key for key in settings if named[key]), key=lambda key: named[key].start(), default="method")
            raise self.document.error((*place, first), str(error)) from error

    def _distinct_folders(self, names: Iterable[str], place: Place) -> None:
        folders: dict[str, tuple[int, str]] = {}
        for number, name in enumerate(names):
            first, other = folders.setdefault(folder_name(name), (number, name))
            if first != number:
                raise self.document.error(
                    (*place, name), f"{name!r} and {other!r} would share the folder {folder_name(name)!r}"
                )

    # ------------------------------------------------------------------ how it is trained
    def _seeds(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
            raise self.document.error(("seeds",), f"expected a list of different whole numbers, got {value!r}")
        return tuple(self.document.number(seed, ("seeds", i), whole=True, above=-1) for i, seed in enumerate(value))

    def _rates(self, value: Any) -> tuple[tuple[float, ...], float | None]:
        if value is None:
            return OWN_RATE, None
        if not isinstance(value, dict):
            return OWN_RATE, float(self.document.number(value, ("lr",), above=0))
        factors = self.document.mapping(value, ("lr",), ("relative",)).get("relative")
        place = ("lr", "relative")
        if not isinstance(factors, list) or not factors or len(set(map(str, factors))) != len(factors):
            raise self.document.error(
                place, f"expected a list of different factors on the methods' own rates, got {factors!r}"
            )
        return tuple(float(self.document.number(each, (*place, i), above=0)) for i, each in enumerate(factors)), None

    def _training(self, value: Any) -> Training:
        values = self._plain_fields(value, ("training",), Training)
        for key in ("min_crop", "hflip"):
            if key in values:
                self._share(values[key], ("training", key))
        training = Training(**values)
        try:
            training.settings(lr=1.0, seed=0)
        except ValueError as error:
            named = next((key for key in values if str(error).startswith(key)), None)
            raise self.document.error(("training", *([named] if named else [])), str(error)) from error
        return training

    def _split(self, value: Any) -> Split:
        split = Split(**self._plain_fields(value, ("split",), Split))
        try:
            stratified_split([], (split.val_fraction, split.test_fraction), split.seed)
        except ValueError as error:
            raise self.document.error(("split",), str(error)) from error
        return split

    def _plain_fields(self, value: Any, place: Place, cls: type) -> dict[str, Any]:
        """Values of the type of a dataclass's defaults."""
        defaults = {each.name: each.default for each in fields(cls)}
        values = self.document.mapping(value, place, defaults)
        for key, each in values.items():
            if isinstance(defaults[key], str):
                values[key] = self.document.text(str(each), (*place, key))
            else:
                self.document.number(each, (*place, key), whole=isinstance(defaults[key], int))
        return values

    def _share(self, value: Any, place: Place) -> None:
        if not 0 <= self.document.number(value, place) <= 1 or (place[-1] == "min_crop" and value == 0):
            raise self.document.error(place, f"expected a share between 0 and 1, got {value!r}")
