"""A table of image paths and labels: columns path, label and perhaps split; one label or several a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits
from deltalens.data.tables import LABEL_COLUMNS, Table, certain_table, image_paths, read_table, splits_of

EXPECTED = """expected a CSV file, or a folder with labels.csv (or train.csv, val.csv, test.csv):
    path,label,split
    images/a.jpg,cat,train
    images/b.jpg,cat;dog,val       (several labels, separated by ; or |, make it multi-label)
(the column split may be absent: images are then split by seed)"""
SEPARATORS = re.compile(r"[;|]")
NAME_COLUMNS = ("class", "class_name", "label_name", "name")


def recognise(root: Path) -> str | None:
    """ "csv" for a table with a column of labels."""
    table = certain_table(root)
    return "csv" if table is not None and table.column(LABEL_COLUMNS) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "csv"; "csv/multilabel" also where no row has several labels."""
    refuse_variant("csv", which, ("multilabel",))
    table = read_table(root, EXPECTED)
    column = table.column(LABEL_COLUMNS)
    if column is None:
        raise ValueError(f"{table.place} has no column of labels, only {', '.join(table.columns)}; {EXPECTED}")
    cells = [(row[column] or "").strip() for row in table.rows]
    paths = image_paths(table, EXPECTED)
    if which == "multilabel" or any(SEPARATORS.search(cell) for cell in cells):
        several = [[name.strip() for name in SEPARATORS.split(cell) if name.strip()] for cell in cells]
        names = in_order({name for row in several for name in row})
        return splits_of(table, paths, [flags(row, names) for row in several], names, options, "multilabel")
    empty = [i for i, cell in enumerate(cells) if not cell]
    if empty:
        raise ValueError(f"{table.where(empty[0])} has no label ({len(empty)} such rows); {EXPECTED}")
    values = in_order(set(cells))
    labels = [values.index(cell) for cell in cells]
    _check_trained(table, labels, values, options)
    return splits_of(table, paths, labels, _names(table, cells, values), options, "classification")


def in_order(names: set[str]) -> list[str]:
    """Numbers by size, names by the alphabet."""
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def flags(present: Sequence[str], names: Sequence[str]) -> Tensor:
    """(classes,) int8: 1 for the names that are present, 0 for the others."""
    return torch.tensor([name in present for name in names], dtype=torch.int8)


def _names(table: Table, cells: Sequence[str], values: list[str]) -> list[str]:
    """Where labels are numbers and another column holds one name for each, those names."""
    column = table.column(NAME_COLUMNS)
    if column is None or not all(re.fullmatch(r"-?\d+", value) for value in values):
        return values
    pairs = {(cell, row[column].strip()) for cell, row in zip(cells, table.rows, strict=True)}
    names = dict(pairs)
    distinct = len(pairs) == len(values) == len(set(names.values())) and all(names.values())
    return [names[value] for value in values] if distinct else values


def _check_trained(table: Table, labels: Sequence[int], names: list[str], options: ReadOptions) -> None:
    """ValueError for classes that only val or test have: most often a misspelling."""
    if table.splits is None or "train" not in table.splits or options.allow_missing_classes:
        return
    trained = {label for label, split in zip(labels, table.splits, strict=True) if split == "train"}
    never = [names[label] for label in sorted(set(labels) - trained)]
    if never:
        raise ValueError(
            f"{table.place} has classes that no training image has: {', '.join(never[:8])}. Correct the labels, or "
            "pass allow_missing_classes (--allow-missing-classes true)"
        )
