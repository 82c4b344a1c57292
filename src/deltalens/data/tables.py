"""What the formats "csv" and "multilabel" share: finding the table, its columns, its images and its splits."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalens.data.assemble import assemble, listed_images
from deltalens.data.image_folder import SPLIT_FOLDERS, ImageFiles
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

FILES = ("labels.csv", "labels.tsv", "annotations.csv", "manifest.csv", "dataset.csv", "metadata.csv")
SPLIT_FILES = ("train.csv", "val.csv", "test.csv")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


@dataclass(frozen=True)
class Table:
    """The rows of one or several files. place: what messages call it; folder: where paths start; splits: of each row,
    or None where the table does not say."""

    place: Path
    folder: Path
    columns: list[str]
    rows: list[dict[str, str]]
    splits: list[str] | None

    def column(self, names: Sequence[str]) -> str | None:
        """The first of these names that is a column, as the table writes it."""
        by_name = {column.strip().lower(): column for column in self.columns}
        return next((by_name[name] for name in names if name in by_name), None)

    def where(self, row: int) -> str:
        return f"row {row + 1} of {self.place}"


def find_tables(root: Path) -> list[Path]:
    """The table files of a root: itself, one of `FILES`, or train.csv and its companions."""
    if root.is_file():
        return [root] if root.suffix.lower() in (".csv", ".tsv") else []
    for name in FILES:
        if (root / name).is_file():
            return [root / name]
    found = [root / name for name in SPLIT_FILES if (root / name).is_file()]
    return found if found and found[0].name == "train.csv" else []


def certain_table(root: Path) -> Table | None:
    """The table of a root for the format "auto": one in a folder needs a column that is named as a path, and, where
    class folders lie beside it, images where it says."""
    if root.is_file():
        return read_table(root, "a table has a header and rows") if find_tables(root) else None
    if not find_tables(root):
        return None
    try:
        table = read_table(root, "")
    except ValueError:
        return None
    column = table.column(PATH_COLUMNS)
    if column is None:
        return None
    first = table.rows[0][column]
    found = any((folder / first).is_file() for folder in (table.folder, table.folder / "images"))
    folders = [each for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")]
    return table if found or len(folders) < 2 else None


def read_table(root: Path, expected: str) -> Table:
    """Read and join the tables of a root. Errors show the expected tree."""
    files = find_tables(root)
    if not files:
        kind = ValueError if root.exists() else FileNotFoundError
        raise kind(f"no table at {root} ({', '.join((*FILES, *SPLIT_FILES))}); {expected}")
    rows: list[dict[str, str]] = []
    splits: list[str] = []
    columns: list[str] = []
    for file in files:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            found = list(reader)
        if columns and columns != list(reader.fieldnames or []):
            raise ValueError(f"{file} has other columns than {files[0]}: {', '.join(reader.fieldnames or [])}")
        columns = list(reader.fieldnames or [])
        if len(columns) < 2 or not found:
            raise ValueError(f"{file} has {len(columns)} columns and {len(found)} rows; {expected}")
        rows += found
        splits += [file.stem] * len(found)
    table = Table(files[0], files[0].parent, columns, rows, splits if files[0].name in SPLIT_FILES else None)
    column = table.column(SPLIT_COLUMNS)
    if table.splits is None and column is not None:
        named = [_split_name(row[column], table.where(i)) for i, row in enumerate(rows)]
        table = Table(table.place, table.folder, columns, rows, named)
    return table


def image_paths(table: Table, expected: str) -> list[Path]:
    """The image of every row: absolute, beside the table, or in a folder `images` beside it."""
    column = table.column(PATH_COLUMNS) or table.columns[0]
    written = [row[column] for row in table.rows]
    folders = [table.folder, table.folder / "images"]
    start = next((folder for folder in folders if (folder / written[0]).is_file()), table.folder)
    return listed_images([start / name for name in written], table.place, expected)


def splits_of(
    table: Table,
    paths: Sequence[Path],
    labels: Sequence[Any],
    class_names: Sequence[str],
    options: ReadOptions,
    task: str,
) -> Splits:
    """Splits as the table says, or drawn by seed where it does not."""
    everything = ImageFiles(paths, labels)
    if table.splits is None:
        return assemble({"all": everything}, class_names, options, {}, task)
    parts = {
        split: everything.subset([i for i, name in enumerate(table.splits) if name == split])
        for split in ("train", "val", "test")
        if split in table.splits
    }
    if "train" not in parts:
        raise ValueError(f"{table.place} has the splits {', '.join(parts)} but no train")
    return assemble(parts, class_names, options, {}, task)


def _split_name(written: str, where: str) -> str:
    for split, names in SPLIT_FOLDERS.items():
        if (written or "").strip().lower() in names:
            return split
    known = ", ".join(name for names in SPLIT_FOLDERS.values() for name in names)
    raise ValueError(f"{where} has the split {written!r}; splits are called {known}")
