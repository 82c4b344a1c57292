"""The datasets of CoOp that come with lists: `split_zhou_*.json`, and the text files of FGVC-Aircraft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deltalens.data.image_folder import ImageFiles

PARTS = ("train", "val", "test")


class Listed(NamedTuple):
    """Parts with labels from 0, class names as published but with spaces, and the folder that paths start from."""

    parts: dict[str, ImageFiles]
    class_names: list[str]
    start: Path


def read_split_file(folder: Path, file: str, images: str, expected: str, allow_missing: bool = False) -> Listed:
    """`split_zhou_*.json`: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    place = folder / file
    lists = _split_lists(place, expected)
    labels = sorted({label for each in lists.values() for _, label, _ in each})
    if labels != list(range(len(labels))):
        gap = next((i for i, label in enumerate(labels) if i != label), 0)
        raise ValueError(f"{place} has {len(labels)} labels, and none is {gap}; labels count from 0 without a gap")
    names: dict[int, str] = {}
    for part, items in lists.items():
        for path, label, name in items:
            if names.setdefault(label, name) != name:
                raise ValueError(f"{place} calls label {label} {names[label]!r} and, for {path} in {part}, {name!r}")
    untrained = sorted(set(labels) - {label for _, label, _ in lists["train"]})
    if untrained and not allow_missing:
        shown = ", ".join(names[label] for label in untrained[:8])
        raise ValueError(
            f"{place} has no training images for {len(untrained)} of its {len(labels)} classes: {shown}; where that is "
            "meant, pass allow_missing_classes (--allow-missing-classes true)"
        )
    start = _start(folder, images, [path for items in lists.values() for path, _, _ in items[:1]])
    parts = {
        part: ImageFiles([start / path for path, _, _ in items], [label for _, label, _ in items])
        for part, items in lists.items()
    }
    return Listed(parts, [spoken(names[label]) for label in labels], start)


def read_aircraft(folder: Path, file: str, images: str, expected: str, allow_missing: bool = False) -> Listed:
    """FGVC-Aircraft's own lists: `variants.txt`, and `images_variant_{train,val,test}.txt` of `<number> <variant>`."""
    variants = [line.strip() for line in _text(folder / file, expected).splitlines() if line.strip()]
    index = {name: label for label, name in enumerate(variants)}
    parts = {}
    for part in PARTS:
        place = folder / f"images_variant_{part}.txt"
        paths, labels = [], []
        for number, line in enumerate(_text(place, expected).splitlines(), 1):
            if not line.strip():
                continue
            image, _, name = line.strip().partition(" ")
            if name not in index:
                raise ValueError(f"line {number} of {place} has the variant {name!r}, which {file} does not list")
            paths.append(folder / images / f"{image}.jpg")
            labels.append(index[name])
        parts[part] = ImageFiles(paths, labels)
    return Listed(parts, [spoken(name) for name in variants], folder / images)


def spoken(name: str) -> str:
    """A class name as a prompt says it."""
    return name.replace("_", " ")


# ------------------------------------------------------------------ details
def _text(file: Path, expected: str) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; {expected}")
    return file.read_text(encoding="utf-8")


def _split_lists(file: Path, expected: str) -> dict[str, list[Any]]:
    try:
        content = json.loads(_text(file, expected))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    missing = [part for part in PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise ValueError(f"{file} has no list {', '.join(missing)}; it needs train, val and test")
    for part in PARTS:
        for number, item in enumerate(content[part], 1):
            kinds = [type(value) for value in item] if isinstance(item, list) else None
            if kinds != [str, int, str]:
                raise ValueError(f"item {number} of {part} in {file} is {item!r}, not [path, label, class name]")
    return {part: content[part] for part in PARTS}


def _start(folder: Path, images: str, first: Sequence[str]) -> Path:
    """The folder that paths start from: the dataset's published one, or, where that has none of the parts' first
    images, the folder of the file or one directly in it that has."""
    others = sorted(place for place in folder.iterdir() if place.is_dir())
    for place in (folder / images, folder, *others):
        if any((place / path).is_file() for path in first):
            return place
    return folder / images
