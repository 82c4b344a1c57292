"""A table with one column for each class: 1 (there), 0 (not there), -1 or empty (not known)."""

from __future__ import annotations

from pathlib import Path

import torch

from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits
from deltalens.data.tables import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    SPLIT_COLUMNS,
    Table,
    certain_table,
    image_paths,
    read_table,
    splits_of,
)

EXPECTED = """expected a CSV file, or a folder with labels.csv, with a column for each class:
    path,cat,dog,horse,split
    images/a.jpg,1,0,0,train
    images/b.jpg,1,1,-1,val        (1 there, 0 not there, -1 or empty not known)
(the column split may be absent: images are then split by seed)"""
VALUES = {"1": 1, "0": 0, "-1": -1, "": -1, "1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}


def recognise(root: Path) -> str | None:
    """ "multilabel" for a table without a column of labels whose other columns hold 1, 0 and -1."""
    table = certain_table(root)
    classes = _classes(table) if table is not None and not table.column(LABEL_COLUMNS) else []
    if not classes:
        return None
    return "multilabel" if all(_value(table.rows[0][name]) is not None for name in classes) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "multilabel"."""
    refuse_variant("multilabel", which)
    table = read_table(root, EXPECTED)
    classes = _classes(table)
    if not classes:
        raise ValueError(f"{table.place} has no column of a class, only {', '.join(table.columns)}; {EXPECTED}")
    labels = []
    for index, row in enumerate(table.rows):
        values = [_value(row[name]) for name in classes]
        if None in values:
            name = classes[values.index(None)]
            raise ValueError(f"{table.where(index)} has {row[name]!r} in the column {name}; {EXPECTED}")
        labels.append(torch.tensor(values, dtype=torch.int8))
    names = [name.strip() for name in classes]
    return splits_of(table, image_paths(table, EXPECTED), labels, names, options, "multilabel")


def _classes(table: Table) -> list[str]:
    """Every column but those of the path and the split."""
    taken = {table.column(PATH_COLUMNS) or table.columns[0], table.column(SPLIT_COLUMNS)}
    return [column for column in table.columns if column not in taken]


def _value(cell: str | None) -> int | None:
    return VALUES.get((cell or "").strip().lower())
