"""The format "voc": boxes in Pascal VOC's XML files, and the usual union of VOC 2007 and 2012.

The challenge's own files count pixels from 1 and name the last pixel of a box: a box over the whole picture is
(1, 1, width, height). Here that is (0, 0, width, height), as in detectron2, so that widths are right minus left and the
overlap of two boxes is what the challenge's tools measure, which add 1. mmdetection subtracts 1 from all four numbers
and adds 1 in its VOC metric: the same overlaps. Files of other tools (labelImg, Roboflow, CVAT) hold edges, from 0, and
are taken as they are written.
"""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.dense_checks import Size
from deltalens.data.dense_items import Objects
from deltalens.data.image_folder import EXTENSIONS
from deltalens.data.object_parts import Annotated, object_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.rolabelimg import has_oriented_boxes
from deltalens.data.splits import Splits

NAME = "voc"
EXPECTED = """expected in {root}, or in VOC2007 and VOC2012 below it, boxes as Pascal VOC has them:
    JPEGImages/*.jpg
    Annotations/*.xml
    ImageSets/Main/train.txt, val.txt, test.txt    (or ImageSets/*.txt, or trainval.txt in place of the first two;
                                                    without ImageSets all three are drawn by seed)"""
YEARS = ("VOC2007", "VOC2012")
OFFICIAL = "PASCAL VOC"  # what <source><annotation> of the challenge's own files begins with


@dataclass(frozen=True)
class Labelled:
    """One object of an XML file."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """One XML file. stated: the (height, width) that it says. official: whether it is one of the challenge's own."""

    objects: list[Labelled]
    stated: Size | None
    official: bool


def tasks(root: Path) -> tuple[str, ...]:
    """("detection",) where `root` is laid out so, and its files are not those of roLabelImg, otherwise ()."""
    kits = [kit / "Annotations" for kit in devkits(root) if (kit / "Annotations").is_dir()]
    return ("detection",) if kits and not any(map(has_oriented_boxes, kits)) else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "voc" of `deltalens.data.read_data`, task "detection".

    Class names are those of info.json or classes.txt, otherwise the sorted names of the objects in train and val.
    Boxes of the challenge's own files begin one pixel further left and above, and `origin["first_pixel"]` is then 1.
    Raises FileNotFoundError or ValueError with the expected tree for missing folders, lists, images and annotations,
    ValueError for XML that cannot be read and for names of other classes.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    kits = [kit for kit in devkits(existing(root, expected)) if (kit / "Annotations").is_dir()]
    if not kits:
        raise ValueError(f"{root} has no folders JPEGImages and Annotations; {expected}")
    numbers = count(1)
    found: dict[str, list[tuple[Path, Path, int]]] = {}  # of every part: picture, annotation, number
    for kit in kits:
        images = by_stem(kit / "JPEGImages")
        for part, ids in _lists(kit, expected).items():
            files = picture_files(ids, images, kit, expected)
            annotations = [kit / "Annotations" / f"{name}.xml" for name in ids]
            if part == "test" and not any(file.is_file() for file in annotations):
                continue  # the test pictures of VOC 2012, whose annotations are kept secret
            found.setdefault(part, []).extend(zip(files, annotations, numbers, strict=False))
    if "train" not in found and "all" not in found:
        raise ValueError(f"{root} has no train.txt or trainval.txt; {expected}")
    read_files = {file: _annotation(file, expected) for part in found.values() for _, file, _ in part}
    names = _names(root, kits, found, read_files)
    first = _first_pixel(list(read_files.values()))
    parts: dict[str, list[Annotated[Objects]]] = {}
    for part, pictures in found.items():
        parts[part] = []
        for picture, file, number in pictures:
            said = read_files[file]
            objects = partial(_objects, said.objects, names, file, first)
            parts[part].append(Annotated(picture, objects, str(file), number, said.stated))
    facts: dict[str, Any] = {"metrics": "voc07"} | ({"years": [kit.name for kit in kits]} if len(kits) > 1 else {})
    facts |= {"first_pixel": first} if first else {}
    return object_splits(parts, names, options, masks=False, origin=facts)


def devkits(root: Path) -> list[Path]:
    """The folders with JPEGImages: the root, else those of the years in it or in its folder VOCdevkit."""
    if (root / "JPEGImages").is_dir():
        return [root]
    for above in (root, root / "VOCdevkit"):
        kits = [above / year for year in YEARS if (above / year / "JPEGImages").is_dir()]
        if kits:
            return kits
    return []


def by_stem(folder: Path) -> dict[str, Path]:
    """stem -> image file, for all directly in a folder."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS}


def picture_files(ids: Sequence[str], pictures: Mapping[str, Path], kit: Path, expected: str) -> list[Path]:
    """The pictures of these names. ValueError where some are missing."""
    missing = [name for name in ids if name not in pictures]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} listed pictures are not in {kit / 'JPEGImages'}: "
            f"{', '.join(missing[:3])}; {expected}"
        )
    return [pictures[name] for name in ids]


def read_list(file: Path) -> list[str]:
    """The first word of every line."""
    return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]


def _lists(kit: Path, expected: str) -> dict[str, list[str]]:
    """Names of pictures of train, val and test, as far as there are lists; of "all" without ImageSets."""
    folder = kit / "ImageSets"
    if not folder.is_dir():
        return {"all": sorted(file.stem for file in (kit / "Annotations").glob("*.xml"))}
    folder = folder / "Main" if (folder / "Main").is_dir() else folder
    lists = {part: read_list(folder / f"{part}.txt") for part in ("train", "val", "test", "trainval")
             if (folder / f"{part}.txt").is_file()}  # fmt: skip
    both = lists.pop("trainval", None)
    if "train" not in lists and both is not None:
        lists["train"] = [name for name in both if name not in set(lists.get("val", ()))]
    if not lists:
        raise ValueError(f"{folder} has no train.txt or trainval.txt; {expected}")
    return lists


def _annotation(file: Path, expected: str) -> Annotation:
    if not file.is_file():
        raise ValueError(f"{file} is missing; {expected}")
    try:
        tree = xml.parse(file).getroot()
        objects = [_object(each) for each in tree.iter("object")]
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (xml.ParseError, ValueError) as error:
        raise ValueError(f"cannot read the annotation {file}: {error}") from error
    source = (tree.findtext("source/annotation") or "").strip().upper()
    return Annotation(objects, (height, width) if height and width else None, source.startswith(OFFICIAL))


def _first_pixel(files: Sequence[Annotation]) -> int:
    """The number of the first pixel: 1 where all files with objects are the challenge's own, and none of their boxes
    begins before that; otherwise 0."""
    told = [each for each in files if each.objects]
    return int(bool(told) and all(each.official and min(min(one.box) for one in each.objects) >= 1 for each in told))


def _object(element: xml.Element) -> Labelled:
    corners = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    name = (element.findtext("name") or "").strip()
    if not name or None in corners:
        raise ValueError("an object without name or bndbox with xmin, ymin, xmax, ymax")
    left, top, right, bottom = (float(corner or "") for corner in corners)
    return Labelled(name, (left, top, right, bottom), (element.findtext("difficult") or "0").strip() == "1")


def _names(root: Path, kits: Sequence[Path], found: Mapping[str, Any], files: Mapping[Path, Annotation]) -> list[str]:
    listed = class_list(root) or class_list(kits[0])
    if listed is not None:
        return listed.names
    trained = [file for part in found if part != "test" for _, file, _ in found[part]]
    return sorted({each.name for file in trained for each in files[file].objects})


def _objects(found: Sequence[Labelled], names: Sequence[str], file: Path, first: int, size: Size) -> Objects:
    for each in found:
        if each.name not in names:
            raise ValueError(
                f"{file} has an object of the unknown class {each.name!r}; the classes of train and val, or of the "
                f"file of names, are {', '.join(names[:8])}{'...' if len(names) > 8 else ''}"
            )
    difficult = [each.difficult for each in found]
    boxes = [(left - first, top - first, right, bottom) for left, top, right, bottom in (each.box for each in found)]
    return Objects.of(boxes, [names.index(each.name) for each in found], difficult=difficult)
