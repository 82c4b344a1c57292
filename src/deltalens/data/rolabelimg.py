"""The format "rolabelimg": oriented boxes in the XML files of roLabelImg, which are VOC's with one more kind of box.

`robndbox` has cx, cy, w and h in pixels and angle in radians. On the screen, where y points down, the side w lies in
the direction (cos angle, sin angle): a positive angle turns the box clockwise. The tool writes angles from 0 to pi. A
plain `bndbox` in such a file is an upright box.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.dense_checks import Size, in_threads
from deltalens.data.image_folder import EXTENSIONS, SPLIT_FOLDERS
from deltalens.data.object_parts import Annotated
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.oriented_items import OrientedObjects
from deltalens.data.oriented_parts import class_numbers, oriented_splits
from deltalens.data.splits import Splits

NAME = "rolabelimg"
EXPECTED = """expected in {root} pictures and XML files of roLabelImg:
    train/*.jpg     train/*.xml                     (val and test may be absent; without train all are drawn by seed)
or  JPEGImages/*.jpg    Annotations/*.xml           (in the folder, or in train, val and test; also images/*.jpg)
with objects that have a robndbox with cx, cy, w, h and angle in radians, or a bndbox"""
LOOKED_AT = 50  # files in which a robndbox is looked for
PICTURES = ("JPEGImages", "images", ".")
ANNOTATIONS = ("Annotations", "annotations", ".")
SIDES = ("cx", "cy", "w", "h", "angle")
EDGES = ("xmin", "ymin", "xmax", "ymax")
Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Annotation:
    """One XML file: corners (n, 4, 2), of each object the name and whether it is difficult, and the (height, width)
    that the file states."""

    corners: np.ndarray
    names: tuple[str, ...]
    difficult: tuple[bool, ...]
    stated: Size | None


def tasks(root: Path) -> tuple[str, ...]:
    """("oriented",) where a file of `root` holds a robndbox, otherwise ()."""
    folders = {annotations for _, annotations in _folders(root).values()}
    return ("oriented",) if any(has_oriented_boxes(folder) for folder in folders) else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def has_oriented_boxes(folder: Path) -> bool:
    """Whether one of the first XML files in a folder holds a robndbox."""
    return any(b"<robndbox>" in file.read_bytes() for file in islice(sorted(folder.glob("*.xml")), LOOKED_AT))


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "rolabelimg" of `deltalens.data.read_data`, task "oriented".

    Class names are those of info.json or classes.txt, otherwise the sorted names of the objects in train and val.
    Raises FileNotFoundError or ValueError with the expected tree for another layout, for annotations without a picture
    and pictures without an annotation, ValueError for XML that cannot be read and for names of other classes.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    found = _folders(existing(root, expected))
    if "train" not in found and "all" not in found:
        raise ValueError(f"{root} has no XML files{' for train' if found else ''}; {expected}")
    numbers = count(1)
    pairs = {part: _pairs(pictures, annotations, expected) for part, (pictures, annotations) in found.items()}
    files = {part: in_threads(lambda pair: read_xml(pair[1]), each) for part, each in pairs.items()}
    listed = class_list(root)
    used = {name for part, each in files.items() if part != "test" for file in each for name in file.names}
    names = listed.names if listed else sorted(used)

    def objects(said: Annotation, file: Path, size: Size) -> OrientedObjects:
        return OrientedObjects.of(said.corners, class_numbers(said.names, names, file), said.difficult)

    parts = {
        part: [
            Annotated(picture, partial(objects, said, file), str(file), next(numbers), said.stated)
            for (picture, file), said in zip(each, files[part], strict=True)
        ]
        for part, each in pairs.items()
    }
    return oriented_splits(parts, names, options, {"metrics": "voc07"})


def read_xml(file: Path) -> Annotation:
    """The objects of one file. ValueError for what is no XML, and for an object without a name or a box."""
    try:
        tree = xml.parse(file).getroot()
        objects = list(tree.iter("object"))
        corners = np.array([_corners(each) for each in objects]).reshape(-1, 4, 2)
        names = tuple((each.findtext("name") or "").strip() for each in objects)
        if not all(names):
            raise ValueError("an object without a name")
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (xml.ParseError, ValueError) as error:
        raise ValueError(f"cannot read the annotation {file}: {error}") from error
    difficult = tuple((each.findtext("difficult") or "0").strip() == "1" for each in objects)
    return Annotation(corners, names, difficult, (height, width) if height and width else None)


def _corners(element: xml.Element) -> list[tuple[float, float]]:
    if element.find("robndbox") is not None:
        x, y, width, height, angle = _numbers(element, "robndbox", SIDES)
        cos, sin = math.cos(angle), math.sin(angle)
        along, across = (width / 2 * cos, width / 2 * sin), (-height / 2 * sin, height / 2 * cos)
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return [(x + i * along[0] + j * across[0], y + i * along[1] + j * across[1]) for i, j in signs]
    left, top, right, bottom = _numbers(element, "bndbox", EDGES)
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _numbers(element: xml.Element, box: str, names: tuple[str, ...]) -> list[float]:
    words = [element.findtext(f"{box}/{name}") for name in names]
    if None in words:
        raise ValueError(f"an object without robndbox (cx, cy, w, h, angle) or bndbox ({', '.join(EDGES)})")
    return [float(word or "") for word in words]


def _folders(root: Path) -> dict[str, Pair]:
    """part -> folders of pictures and of XML files; "all" where there are no parts."""
    found: dict[str, Pair] = {}
    for part, names in SPLIT_FOLDERS.items():
        for name in names:
            pair = _pair_of_folders(root / name)
            if pair is not None:
                found.setdefault(part, pair)
    here = None if found else _pair_of_folders(root)
    return found if here is None else {"all": here}


def _pair_of_folders(above: Path) -> Pair | None:
    annotations = next((above / name for name in ANNOTATIONS if any((above / name).glob("*.xml"))), None)
    pictures = next((above / name for name in PICTURES if any(_pictures(above / name))), None)
    return (pictures, annotations) if annotations is not None and pictures is not None else None


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS)


def _pairs(pictures: Path, annotations: Path, expected: str) -> list[Pair]:
    by_stem = {path.stem: path for path in sorted(_pictures(pictures))}
    files = sorted(annotations.glob("*.xml"))
    lonely = [file for file in files if file.stem not in by_stem]
    if lonely:
        raise ValueError(f"{len(lonely)} annotations have no picture in {pictures}: {lonely[0]}; {expected}")
    missing = sorted(by_stem.keys() - {file.stem for file in files})
    if missing:
        raise ValueError(f"{annotations / missing[0]}.xml is missing ({len(missing)} in all); {expected}")
    return [(by_stem[file.stem], file) for file in files]
