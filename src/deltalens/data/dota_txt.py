"""The format "dota": oriented boxes as quadrilaterals in one text file for each picture, as DOTA has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.dense_checks import Size, in_threads
from deltalens.data.image_folder import SPLIT_FOLDERS, image_files
from deltalens.data.object_parts import Annotated
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.oriented_items import OrientedObjects
from deltalens.data.oriented_parts import class_numbers, oriented_splits
from deltalens.data.splits import Splits

NAME = "dota"
EXPECTED = """expected in {root} oriented boxes as DOTA has them:
    train/images/*.png      train/labelTxt/*.txt    (also labelTxt-v1.0, -v1.5, -v2.0, annfiles)
    val/...                 test/...                (may be absent, or a test without labels; trainval in place of train
                                                     and val; images and labelTxt directly in the folder: all are drawn)
with lines `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`, of which the last word may be missing"""
VERSIONS = ("v1.0", "v1.5", "v2.0")
FOLDERS = ("labelTxt", *(f"labelTxt-{version}" for version in reversed(VERSIONS)), "annfiles")
HEADERS = ("imagesource", "gsd", "acquisition dates")  # of lines above the boxes, before a colon
UPRIGHT = "hbb"  # in the names of folders that hold the upright boxes


@dataclass(frozen=True)
class Lines:
    """The boxes of one text file: corners (n, 8), and of each the class and how difficult it is, 0 for
    not."""

    corners: np.ndarray
    names: tuple[str, ...]
    difficult: tuple[int, ...]


def tasks(root: Path) -> tuple[str, ...]:
    """("oriented",) where `root` is laid out so, otherwise ()."""
    return ("oriented",) if any(labels is not None for _, labels in folders(root).values()) else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "dota" of `deltalens.data.read_data`, task "oriented".

    which: "v1.0", "v1.5" or "v2.0" where there are labels of several versions, otherwise the newest. Class names are
    those of info.json or classes.txt, otherwise the sorted names of the objects in train and val. Difficult is every
    object whose last number is not 0. Raises FileNotFoundError or ValueError with the expected tree for another layout
    and for missing label files, ValueError with file and line for what is no box, and for names of other classes.
    """
    refuse_variant(NAME, which, VERSIONS)
    expected = EXPECTED.format(root=root)
    found = {
        part: (pictures, labels)
        for part, (pictures, labels) in folders(existing(root, expected), which).items()
        if labels is not None or part != "test"
    }
    if "train" not in found and "all" not in found:
        raise ValueError(f"{root} has no folders train/images and train/labelTxt; {expected}")
    numbers = count(1)
    files: dict[str, list[tuple[Path, Path]]] = {}
    for part, (pictures, labels) in found.items():
        if labels is None:
            raise ValueError(f"{pictures.parent} has no folder of labels; {expected}")
        files[part] = label_pairs(pictures, labels, expected)
    texts = {part: in_threads(lambda pair: read_lines(pair[1]), pairs) for part, pairs in files.items()}
    listed = class_list(root)
    used = {name for part, each in texts.items() if part != "test" for lines in each for name in lines.names}
    names = listed.names if listed else sorted(used)
    parts = {
        part: [
            Annotated(picture, partial(_objects, lines, names, file), str(file), next(numbers))
            for (picture, file), lines in zip(pairs, texts[part], strict=True)
        ]
        for part, pairs in files.items()
    }
    return oriented_splits(parts, names, options, {"metrics": "voc07"})


def folders(root: Path, version: str = "") -> dict[str, tuple[Path, Path | None]]:
    """part -> folders of pictures and of labels, None where there are none; "all" where there are no parts."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for part, synonyms in (SPLIT_FOLDERS | {"trainval": ("trainval",)}).items():
        for name in synonyms:
            if (root / name / "images").is_dir():
                found.setdefault(part, (root / name / "images", _label_folder(root / name, version)))
    both = found.pop("trainval", None)
    if both is not None and "train" not in found:
        found["train"] = both
    if not found and (root / "images").is_dir():
        found["all"] = (root / "images", _label_folder(root, version))
    return found


def read_lines(file: Path) -> Lines:
    """The boxes of a text file, without the lines above them that tell the source and the size of a pixel. ValueError
    with file and line for what is no box."""
    corners: list[list[float]] = []
    names: list[str] = []
    difficult: list[int] = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or (not names and line.partition(":")[0].strip().lower() in HEADERS):
            continue
        try:
            points = [float(word) for word in words[:8]]
            hard = int(words[9]) if len(words) > 9 else 0
        except ValueError:
            points, hard = [], -1
        if len(points) < 8 or len(words) not in (9, 10) or hard < 0 or not np.isfinite(points).all():
            raise ValueError(
                f"line {number} of {file} is {line[:80]!r}, expected `x1 y1 x2 y2 x3 y3 x4 y4 class difficult` with a "
                "class of one word (write small-vehicle) and difficult 0, 1 or 2"
            )
        corners.append(points)
        names.append(words[8])
        difficult.append(hard)
    return Lines(np.array(corners).reshape(-1, 8), tuple(names), tuple(difficult))


def _label_folder(above: Path, version: str) -> Path | None:
    """The folder of text files beside a folder of pictures; DOTA's archives have one more folder in it."""
    for name in (f"labelTxt-{version}",) if version else FOLDERS:
        folder = above / name
        if not folder.is_dir():
            continue
        inner = [each for each in sorted(folder.iterdir()) if each.is_dir() and UPRIGHT not in each.name.lower()]
        return inner[0] if len(inner) == 1 and not any(folder.glob("*.txt")) else folder
    return None


def label_pairs(pictures: Path, labels: Path, expected: str) -> list[tuple[Path, Path]]:
    """Pictures and their label files. ValueError where one is without the other."""
    pairs = [(path, labels / f"{path.stem}.txt") for path in image_files(pictures)]
    if not pairs:
        raise ValueError(f"{pictures} holds no images; {expected}")
    there = set(labels.glob("*.txt"))
    _refuse([file for _, file in pairs if file not in there], f"label files are missing in {labels}", expected)
    known = {file for _, file in pairs}
    _refuse(sorted(there - known), f"label files belong to no picture in {pictures}", expected)
    return pairs


def _refuse(files: Sequence[Path], words: str, expected: str) -> None:
    if files:
        raise ValueError(f"{len(files)} {words}: {', '.join(file.name for file in files[:3])}; {expected}")


def _objects(lines: Lines, names: Sequence[str], file: Path, size: Size) -> OrientedObjects:
    return OrientedObjects.of(lines.corners, class_numbers(lines.names, names, file), np.array(lines.difficult) > 0)
