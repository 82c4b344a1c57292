"""Pascal VOC 2007 as a classification set: which of 20 kinds of object are in the picture.

"voc2007": several labels an image, from ImageSets/Main or, where that lacks the lists of the classes, from
Annotations. An object that is only there as "difficult" counts as neither (-1), as in the challenge.

"voc2007/single": one label an image, for 20-way top-1 as in the Mona paper. Its authors read their own lists,
train2mmcls.txt and test2mmcls.txt (`<path> <label>`), which are not published, nor is the rule by which one of several
kinds was chosen. Where these lists are there they are read. Otherwise the label is the kind of the object with the
largest box, of those that are not difficult where there are any: a choice of ours, to be named beside the numbers.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml
from pathlib import Path

import torch

from deltalens.data.assemble import assemble, existing, listed_images
from deltalens.data.image_folder import ImageFiles
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
EXPECTED = """expected VOCdevkit/VOC2007, or a folder above it:
    {root}/JPEGImages/000001.jpg
    {root}/ImageSets/Main/train.txt, val.txt, test.txt    (and aeroplane_train.txt..., or Annotations)
    {root}/Annotations/000001.xml                         (voc2007/single needs them)"""
SPLITS = ("train", "val", "test")
LOOKED_AT = 20  # annotations that tell whose data it is
OWN_LISTS = {"train": "train2mmcls.txt", "test": "test2mmcls.txt"}


def recognise(root: Path) -> str | None:
    """ "voc2007" for the folders of the challenge; None for others' data laid out like it, whose classes are others."""
    folder = _devkit(root)
    return "voc2007" if folder is not None and _of_the_challenge(folder) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The formats "voc2007" and "voc2007/single"."""
    refuse_variant("voc2007", which, ("single",))
    existing(root, EXPECTED.format(root=root))
    if which and all((root / name).is_file() for name in OWN_LISTS.values()):
        parts = {split: _own_list(root, name) for split, name in OWN_LISTS.items()}
        return assemble(parts, CLASSES, options, {"labels": "from " + ", ".join(OWN_LISTS.values())})
    folder = _devkit(root)
    if folder is None:
        raise ValueError(f"{root} is no VOC 2007; {EXPECTED.format(root=root)}")
    ids = {split: _ids(folder, split) for split in SPLITS if (folder / f"ImageSets/Main/{split}.txt").is_file()}
    if not {"train", "val"} <= ids.keys():
        raise ValueError(f"{folder}/ImageSets/Main lacks train.txt or val.txt; {EXPECTED.format(root=folder)}")
    parts = {}
    for split, names in ids.items():
        paths = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
        listed_images(paths, folder / f"ImageSets/Main/{split}.txt", EXPECTED.format(root=folder))
        labels = [_largest(folder, name) for name in names] if which else _presence(folder, split, names)
        parts[split] = ImageFiles(paths, labels)
    if which:
        return assemble(parts, CLASSES, options, {"labels": "the object with the largest box"})
    return assemble(parts, CLASSES, options, {}, "multilabel")


def _devkit(root: Path) -> Path | None:
    """The folder with JPEGImages: the root or below it."""
    for folder in (root, root / "VOC2007", root / "VOCdevkit/VOC2007"):
        if (folder / "JPEGImages").is_dir() and (folder / "ImageSets/Main").is_dir():
            return folder
    return None


def _of_the_challenge(folder: Path) -> bool:
    """Whether there are lists of the 20 classes, or the first annotations name no class but these."""
    if (folder / f"ImageSets/Main/{CLASSES[0]}_train.txt").is_file() or not (folder / "Annotations").is_dir():
        return True
    names: set[str] = set()
    for file in sorted((folder / "Annotations").glob("*.xml"))[:LOOKED_AT]:
        try:
            names |= {(each.findtext("name") or "").strip() for each in xml.parse(file).getroot().iter("object")}
        except xml.ParseError:
            continue  # the reader names it
    return names <= set(CLASSES)


def _ids(folder: Path, split: str) -> list[str]:
    return (folder / f"ImageSets/Main/{split}.txt").read_text().split()


def _presence(folder: Path, split: str, names: list[str]) -> list[torch.Tensor]:
    """(20,) of 1, 0 and -1 for every image."""
    files = [folder / f"ImageSets/Main/{name}_{split}.txt" for name in CLASSES]
    if all(file.is_file() for file in files):
        columns = []
        for file in files:
            written = dict(line.split() for line in file.read_text().splitlines() if line.strip())
            meaning = {"1": 1, "-1": 0, "0": -1}  # the challenge writes 0 for difficult and -1 for absent
            columns.append([meaning[written[name]] for name in names])
        return list(torch.tensor(columns, dtype=torch.int8).T.contiguous())
    labels = []
    for name in names:
        label = torch.zeros(len(CLASSES), dtype=torch.int8)
        for kind, difficult, _ in _objects(folder, name):
            index = CLASSES.index(kind)
            label[index] = 1 if not difficult or label[index] == 1 else -1
        labels.append(label)
    return labels


def _largest(folder: Path, name: str) -> int:
    found = _objects(folder, name)
    if not found:
        raise ValueError(f"{folder}/Annotations/{name}.xml has no object of the 20 kinds")
    kind, _, _ = max(found, key=lambda each: (not each[1], each[2]))
    return CLASSES.index(kind)


def _objects(folder: Path, name: str) -> list[tuple[str, bool, float]]:
    """(kind, difficult, area of the box) of every object."""
    file = folder / "Annotations" / f"{name}.xml"
    if not file.is_file():
        raise ValueError(f"{file} is missing; {EXPECTED.format(root=folder)}")
    found = []
    for each in xml.parse(file).getroot().iter("object"):
        kind = (each.findtext("name") or "").strip()
        if kind in CLASSES:
            low_x, low_y, high_x, high_y = (
                float(each.findtext(f"bndbox/{key}") or 0) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = (each.findtext("difficult") or "0").strip() == "1"
            found.append((kind, difficult, (high_x - low_x) * (high_y - low_y)))
    return found


def _own_list(root: Path, name: str) -> ImageFiles:
    lines = [line.strip() for line in (root / name).read_text().splitlines() if line.strip()]
    matches = [re.fullmatch(r"(.+) (\d+)", line) for line in lines]
    for number, match in enumerate(matches, 1):
        if match is None or int(match[2]) >= len(CLASSES):
            raise ValueError(f"line {number} of {root / name} is {lines[number - 1]!r}, expected a path and 0 to 19")
    paths = listed_images([root / match[1] for match in matches], root / name, EXPECTED.format(root=root))
    return ImageFiles(paths, [int(match[2]) for match in matches])
