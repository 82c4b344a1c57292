"""The format "voc-masks": Pascal VOC's segmentation, palette files of 20 classes and background."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.image_folder import image_files
from deltalens.data.mask_parts import Meaning, Pair, mask_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits
from deltalens.data.voc2007 import CLASSES
from deltalens.data.voc_boxes import by_stem, devkits, picture_files, read_list

NAME = "voc-masks"
EXPECTED = """expected in {root}, or in VOC2012 or VOC2007 below it, masks as Pascal VOC has them:
    JPEGImages/*.jpg
    SegmentationClass/*.png                          (indices of a palette; 255: ignored)
    ImageSets/Segmentation/train.txt, val.txt        (test.txt where its masks are there)"""
MASKS = "SegmentationClass"


def tasks(root: Path) -> tuple[str, ...]:
    """("segmentation",) where `root` is laid out so, otherwise ()."""
    return ("segmentation",) if _kits(root) else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "voc-masks" of `deltalens.data.read_data`, task "segmentation".

    Classes are background and the 20 kinds, or those of info.json or classes.txt. Of VOCdevkit the last year is read.
    Where there are no masks for a test part, val, on which papers report, is the test part here, and val is split off
    train by seed; `protocol="trainval"` trains on all of train.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    kits = _kits(existing(root, expected))
    if not kits:
        raise ValueError(f"{root} has no folders JPEGImages and SegmentationClass; {expected}")
    kit = kits[-1]
    pictures, masks = by_stem(kit / "JPEGImages"), {path.stem: path for path in image_files(kit / MASKS)}
    parts: dict[str, list[Pair]] = {}
    for part in ("train", "val", "test"):
        file = kit / "ImageSets/Segmentation" / f"{part}.txt"
        ids = read_list(file) if file.is_file() else []
        if part == "test" and not any(name in masks for name in ids):
            continue
        lonely = [name for name in ids if name not in masks]
        if lonely:
            raise ValueError(f"{len(lonely)} pictures of {file} have no mask in {kit / MASKS}: {lonely[0]}; {expected}")
        found = picture_files(ids, pictures, kit, expected)
        parts[part] = [(picture, masks[name]) for picture, name in zip(found, ids, strict=True)]
    parts = {part: pairs for part, pairs in parts.items() if pairs}
    if "train" not in parts:
        raise ValueError(f"{kit}/ImageSets/Segmentation has no train.txt; {expected}")
    origin = {}
    if "test" not in parts and "val" in parts:
        parts["test"], origin = parts.pop("val"), {"test": "val"}
    listed = class_list(root) or class_list(kit)
    names = ["background", *CLASSES]
    meaning = Meaning(names, {label: label for label in range(len(names))})
    return mask_splits(parts, Meaning.of_list(listed, options.ignore_index) if listed else meaning, options, origin)


def _kits(root: Path) -> list[Path]:
    return [kit for kit in devkits(root) if (kit / MASKS).is_dir() and (kit / "ImageSets/Segmentation").is_dir()]
