"""What the classes of dense data are called, where a file beside the data says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("classes.txt", "names.txt", "class_names.txt", "labels.txt", "obj.names")
KEYS = ("classes", "class_names", "names", "semantic_classes")
NO_CLASS = {"void", "unlabelled", "unlabeled", "ignore", "ignored", "_ignore_", "unknown"}


@dataclass(frozen=True)
class ClassList:
    """names: as the file lists them. ignore_index, values: of masks, the value without a class and the values of the
    names, None where the file does not say. where: the file."""

    names: list[str]
    where: Path
    ignore_index: int | None = None
    values: list[int] | None = None


def class_list(root: Path, keys: tuple[str, ...] = KEYS) -> ClassList | None:
    """The names of info.json, else of a text file with a name on a line; None where there is neither.

    Raises ValueError for names twice, and for `values` that are not as many as the names.
    """
    info = root / "info.json"
    if info.is_file():
        said = read_json(info)
        names = next((said[key] for key in keys if isinstance(said, dict) and said.get(key)), None)
        if isinstance(names, list):
            names = [str(name) for name in names]
            return _checked(ClassList(names, info, said.get("ignore_index"), said.get("values")))
    for name in FILES:
        if (root / name).is_file():
            lines = [line.strip() for line in (root / name).read_text(encoding="utf-8-sig").splitlines()]
            return _checked(ClassList([line for line in lines if line], root / name))
    return None


def _checked(found: ClassList) -> ClassList:
    same = [name for name in found.names if found.names.count(name) > 1]
    if same:
        raise ValueError(f"{found.where} has the class {same[0]!r} twice")
    if found.values is not None and len(found.values) != len(found.names):
        raise ValueError(f"{found.where} has {len(found.names)} classes and {len(found.values)} values of them")
    return found


def read_json(file: Path) -> Any:
    """ValueError names a file that is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
