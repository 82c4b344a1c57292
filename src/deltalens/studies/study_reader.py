"""Reads a study file into a checked `Study`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from deltalens.data.splits import stratified_split
from deltalens.methods import Method, make_config
from deltalens.studies.candidates import SearchPlan
from deltalens.studies.dataset_reader import read_datasets
from deltalens.studies.dense_fields import TOP, read_dense
from deltalens.studies.published import read_published
from deltalens.studies.search_reader import check_rows, read_search, relative_search
from deltalens.studies.search_space import RATES
from deltalens.studies.study import (
    BackboneEntry,
    Protocol,
    Split,
    Study,
    Training,
    Variant,
)
from deltalens.studies.study_base import merged, read_with_base
from deltalens.studies.study_fields import TRAINING, check_training, distinct_folders, plain_fields, training_fields
from deltalens.studies.study_yaml import Document, Place
from deltalens.studies.training_amounts import AMOUNTS

BACKBONE_FIELDS = ("model", "label", "img_size", "checkpoint", "pretrained", "options")
FIELDS = ("title", "backbones", "datasets", "methods", "seeds", "training", "split", "lr", "keep_adapters", "x_title")
FIELDS += (
    "reference",
    "scatter",
    "base_lr",
    "search",
    "protocol",
    "published",
    "base_to_novel",
    "targets",
    *AMOUNTS,
    *TOP,
)
# of a row, beside a method and its settings
ROW_FIELDS = ("x", "curve", *RATES, "training", "search", "backbone", "tower", "datasets")
OF_BACKBONES = ("img_size", "pretrained", "checkpoint", "model", "num_classes")


def read_study(path: str | os.PathLike, datasets: Mapping[str, str] | None = None) -> Study:
    """Read and check a study file. datasets: name -> folder, in the place of, or beside, those of the file; the name ""
    stands for all datasets of the file that have no folder.

    Raises ValueError that names line and field and says what is allowed, FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study file at {path}")
    return _Reader(read_with_base(path)).study(dict(datasets or {}))


class _Reader:
    """Makes a `Study` of a document."""

    def __init__(self, document: Document):
        self.document = document

    def study(self, given: dict[str, str]) -> Study:
        top = self.document.mapping(self.document.content, (), FIELDS)
        for name in ("backbones", "methods"):
            if not top.get(name):
                raise self.document.error((), f"{name} is missing; a study has {', '.join(FIELDS)}")
        said, lr, base_lr = self._training(top, ())
        task, head = read_dense(self.document, top)
        split = self._split(top.get("split") or {})
        study = Study(
            title=self.document.text(top.get("title", self.document.path.stem), ("title",)),
            backbones=tuple(
                replace(each, options={**head, **each.options}) for each in self._backbones(top["backbones"])
            ),
            task=task,
            variants=self._variants(top["methods"]),
            seeds=self._seeds(top.get("seeds", [0, 1, 2])),
            training=replace(Training(), **said),
            split=split,
            search=self._search(top),
            lr=lr,
            base_lr=base_lr,
            protocol=self._protocol(top.get("protocol")),
            keep_adapters=self.document.flag(top.get("keep_adapters", True), ("keep_adapters",)),
            x_title=self.document.text(top.get("x_title", "x"), ("x_title",)),
            **read_datasets(self.document, top, given, split.seed),
            base_to_novel=self.document.flag(top.get("base_to_novel", False), ("base_to_novel",)),
            reference=top.get("reference"),
            scatter=tuple(top["scatter"]) if isinstance(top.get("scatter"), list) else top.get("scatter"),
        )
        self._check_report(study)
        self._check_datasets_of_rows(study)
        for variant in study.variants:
            check_training(
                self.document, study.training_of(variant), variant.training, ("methods", variant.label, "training")
            )
        check_rows(self.document, study)
        return replace(study, published=read_published(self.document, top.get("published"), study))

    def _check_datasets_of_rows(self, study: Study) -> None:
        known = [*dict.fromkeys(dataset.source for dataset in study.datasets), *study.left_out]
        for variant in study.variants:
            self.document.mapping(dict(variant.datasets), ("methods", variant.label, "datasets"), known)

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
        distinct_folders(self.document, found, ("backbones",))
        return tuple(found.values())

    def _variants(self, value: Any) -> tuple[Variant, ...]:
        entries = self.document.mapping(value, ("methods",))
        found = {label: self._row_on_all(label, entry, ("methods", label)) for label, entry in entries.items()}
        distinct_folders(self.document, found, ("methods",))
        return tuple(found.values())

    def _row_on_all(self, label: str, entry: Any, place: Place) -> Variant:
        """A row, with what is different on single datasets."""
        if not isinstance(entry, dict) or "datasets" not in entry:
            return self._variant(label, entry, place)
        own = self.document.mapping(entry["datasets"], (*place, "datasets"))
        common = {key: each for key, each in entry.items() if key != "datasets"}
        found = {}
        for name, different in own.items():
            here: Place = (*place, "datasets", name)
            found[name] = self._variant(label, merged(common, self.document.mapping(different, here)), here)
        return replace(self._variant(label, common, place), datasets=found)

    def _variant(self, label: str, entry: Any, place: Place) -> Variant:
        own: dict[str, Any] = {}
        if isinstance(entry, dict):
            row = {key: each for key, each in entry.items() if key in ROW_FIELDS}
            entry = {key: each for key, each in entry.items() if key not in ROW_FIELDS}
            if "methods" in entry:
                entry = self.document.mapping(entry, place, ("methods", *ROW_FIELDS))["methods"]
            own = self._row(row, place)
        several = entry if isinstance(entry, list) else [entry]
        if (*place, "methods") in self.document.lines:
            place = (*place, "methods")
        if not several:
            raise self.document.error(place, "names no method")
        methods = [
            self._method(each, (*place, index) if isinstance(entry, list) else place)
            for index, each in enumerate(several)
        ]
        return Variant(label, tuple(methods), **own)

    def _row(self, row: dict[str, Any], place: Place) -> dict[str, Any]:
        """The fields of a `Variant` that stand beside the method's settings."""
        if row.get("x") is not None:
            self.document.number(row["x"], (*place, "x"))
        elif row.get("curve") is not None:
            raise self.document.error((*place, "curve"), "a row of a curve needs x, a number")
        training, lr, base_lr = self._training(row, place)
        backbone = self.document.mapping(row.get("backbone") or {}, (*place, "backbone"))
        for name in OF_BACKBONES:
            if name in backbone:
                raise self.document.error((*place, "backbone", name), "is said of all methods, under backbones")
        search = row.get("search")
        return {
            "x": row.get("x"),
            "curve": row.get("curve"),
            "lr": lr,
            "base_lr": base_lr,
            "training": training,
            "own_search": "search" in row,
            "search": None if search is None else read_search(self.document, search, (*place, "search")),
            "backbone": backbone,
            "tower": None if row.get("tower") is None else self.document.text(row["tower"], (*place, "tower")),
        }

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

    # ------------------------------------------------------------------ how it is trained
    def _seeds(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
            raise self.document.error(("seeds",), f"expected a list of different whole numbers, got {value!r}")
        return tuple(self.document.number(seed, ("seeds", i), whole=True, above=-1) for i, seed in enumerate(value))

    def _search(self, top: dict[str, Any]) -> SearchPlan | None:
        short = top.get("lr") if isinstance(top.get("lr"), dict) else None
        if short is not None and top.get("search") is not None:
            raise self.document.error(("search",), "lr: {relative: [...]} is a search too; say one of them")
        if top.get("search") is not None:
            return read_search(self.document, top["search"], ("search",))
        return None if short is None else relative_search(self.document, short, ("lr",))

    def _protocol(self, value: Any) -> Protocol | None:
        if value is not None and value not in get_args(Protocol):
            raise self.document.error(("protocol",), f"expected {' or '.join(get_args(Protocol))}, got {value!r}")
        return value

    def _training(self, entry: dict[str, Any], place: Place) -> tuple[dict[str, Any], float | None, float | None]:
        """(fields of a `Training`, lr, base_lr) of the study or of a row; a rate may stand in training or beside it."""
        where: Place = (*place, "training")
        values = self.document.mapping(entry.get("training") or {}, where, (*TRAINING, *RATES))
        rates: dict[str, float] = {}
        for at, source in ((place, entry), (where, values)):
            for name in RATES:
                value = source.get(name)
                if value is None or (at == () and name == "lr" and isinstance(value, dict)):  # a search
                    continue
                if rates:
                    raise self.document.error((*at, name), "a rate is said already; lr or base_lr, once")
                rates[name] = float(self.document.number(value, (*at, name), above=0))
        said = training_fields(self.document, {k: v for k, v in values.items() if k not in RATES}, where)
        if not place:
            check_training(self.document, replace(Training(), **said), said, where)
        return said, rates.get("lr"), rates.get("base_lr")

    def _split(self, value: Any) -> Split:
        split = Split(
            **plain_fields(self.document, value, ("split",), {each.name: each.default for each in fields(Split)})
        )
        try:
            stratified_split([], (split.val_fraction, split.test_fraction), split.seed)
        except ValueError as error:
            raise self.document.error(("split",), str(error)) from error
        return split
