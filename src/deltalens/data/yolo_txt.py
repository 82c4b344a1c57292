"""The format "yolo": boxes, or polygons, in one text file for each picture, in shares of its width and height."""

from __future__ import annotations

import re
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.dense_checks import Size
from deltalens.data.dense_items import Objects
from deltalens.data.image_folder import SPLIT_FOLDERS, image_files
from deltalens.data.object_parts import Annotated, object_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.outlines import Outline
from deltalens.data.splits import Splits

NAME = "yolo"
EXPECTED = """expected in {root} objects as YOLO has them:
    images/train/*.jpg      labels/train/*.txt      (or train/images and train/labels; val and test may be absent;
                                                     without train all are drawn by seed)
    data.yaml or classes.txt                        (the names of the classes)
with lines `class x y width height` or `class x1 y1 x2 y2 x3 y3 ...` in shares of the picture"""
LISTS = {"classes.txt", "names.txt", "train.txt", "val.txt", "test.txt", "data.txt", "README.txt"}
Lines = list[tuple[int, np.ndarray]]  # class and the other numbers


def tasks(root: Path) -> tuple[str, ...]:
    """("detection",), with polygons ("detection", "instance"), () where `root` is not laid out so."""
    for _, labels in folders(root).values():
        for file in _label_files(labels):
            lines = file.read_text().split("\n", 1)[0].split()
            if lines:
                return ("detection", "instance") if len(lines) > 5 else ("detection",)
    return ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "yolo" of `deltalens.data.read_data`, tasks "detection" and "instance".

    A picture without a text file has no objects. Classes are those of data.yaml, info.json or classes.txt, otherwise
    numbers. Raises FileNotFoundError or ValueError with the expected tree for another layout, ValueError with file and
    line for what is no box, and for classes without a name.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    found = folders(existing(root, expected))
    if not found or not any(_label_files(labels) for _, labels in found.values()):
        raise ValueError(f"{root} has no folders of pictures and of label files beside them; {expected}")
    if "train" not in found and "all" not in found:
        raise ValueError(f"{root} has {', '.join(found)} but no train; {expected}")
    masks, numbers = options.task == "instance", count(1)
    texts: dict[str, list[tuple[Path, Path, Lines]]] = {}
    for part, (pictures, labels) in found.items():
        files = [(path, (labels / path.relative_to(pictures)).with_suffix(".txt")) for path in image_files(pictures)]
        if not files:
            raise ValueError(f"{pictures} holds no images; {expected}")
        _check_pictures_of(labels, {file for _, file in files}, pictures)
        texts[part] = [(path, file, _lines(file)) for path, file in files]
    highest = max((label for each in texts.values() for *_, lines in each for label, _ in lines), default=-1)
    names = _names(root) or [str(number) for number in range(highest + 1)]
    for named in texts.values():
        for _, file, lines in named:
            beyond = [label for label, _ in lines if label >= len(names)]
            if beyond:
                raise ValueError(
                    f"{file} has the class {beyond[0]}, and there are {len(names)} names: 0 to {len(names) - 1}"
                )
    parts = {
        part: [Annotated(path, partial(_objects, lines, masks), str(file), next(numbers)) for path, file, lines in each]
        for part, each in texts.items()
    }
    return object_splits(parts, names, options, masks)


def folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """part -> folders of pictures and of labels; "all" where there are no parts."""
    found: dict[str, tuple[Path, Path]] = {}
    for part, synonyms in SPLIT_FOLDERS.items():
        for name in synonyms:
            pairs = [(root / "images" / name, root / "labels" / name), (root / name / "images", root / name / "labels")]
            pairs += [
                (folder, root / "labels" / folder.name) for folder in sorted((root / "images").glob(f"{name}20??"))
            ]
            for pictures, labels in pairs:
                if pictures.is_dir() and labels.is_dir():
                    found.setdefault(part, (pictures, labels))
    if not found and (root / "images").is_dir() and (root / "labels").is_dir():
        return {"all": (root / "images", root / "labels")}
    return found


def _label_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.txt") if file.name not in LISTS)


def _check_pictures_of(labels: Path, known: set[Path], pictures: Path) -> None:
    lonely = [file for file in _label_files(labels) if file not in known]
    if lonely:
        raise ValueError(f"{len(lonely)} label files belong to no picture in {pictures}: {lonely[0]}")


def _lines(file: Path) -> Lines:
    if not file.is_file():
        return []
    found: Lines = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = np.array([float(word) for word in words[1:]])
            label = int(words[0])
        except ValueError:
            label, values = -1, np.zeros(0)
        if label < 0 or not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise ValueError(
                f"line {number} of {file} is {line[:60]!r}, expected `class x y width height` or a polygon's points"
            )
        found.append((label, values))
    return found


def _objects(lines: Lines, masks: bool, size: Size) -> Objects:
    height, width = size
    boxes: list[tuple[float, ...]] = []
    outlines: list[Outline] = []
    for _, values in lines:
        if len(values) == 4:
            x, y, w, h = values * (width, height, width, height)
            boxes.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
            outlines.append(None)
        else:
            points = values.reshape(-1, 2) * (width, height)
            boxes.append((*points.min(0), *points.max(0)))
            outlines.append([points.reshape(-1).tolist()])
    return Objects.of(boxes, [label for label, _ in lines], outlines=outlines if masks else ())


def _names(root: Path) -> list[str] | None:
    """The names in data.yaml, a list or a dictionary from 0; else those of a file of names."""
    for file in (*sorted(root.glob("*.yaml")), *sorted(root.glob("*.yml"))):
        import yaml

        try:
            said: Any = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read {file}: {re.sub(chr(10), ' ', str(error))}") from error
        names = said.get("names") if isinstance(said, dict) else None
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"{file} numbers its names {sorted(names)[:4]}..., expected 0, 1, 2, ...")
            names = [names[number] for number in range(len(names))]
        if names:
            return [str(name) for name in names]
    listed = class_list(root) or class_list(root / "labels")
    return listed.names if listed else None
