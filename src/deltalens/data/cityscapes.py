"""The format "cityscapes": street scenes with fine annotations in 19 classes, and whatever is laid out so."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.assemble import existing
from deltalens.data.mask_parts import Meaning, Pair, mask_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

NAME = "cityscapes"
EXPECTED = """expected in {root} the folders of Cityscapes:
    leftImg8bit/train/<city>/*_leftImg8bit.png
    gtFine/train/<city>/*_gtFine_labelTrainIds.png     (or *_gtFine_labelIds.png)
    leftImg8bit/val/..., gtFine/val/..."""
PICTURE, TRAIN_IDS, IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
LAST_ID = 33
PARTS = {"train": "train", "test": "val"}


def tasks(root: Path) -> tuple[str, ...]:
    """("segmentation",) where `root` is laid out so, otherwise ()."""
    there = (root / "leftImg8bit/train").is_dir() and (root / "gtFine/train").is_dir()
    return ("segmentation",) if there else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "cityscapes" of `deltalens.data.read_data`, task "segmentation".

    labelTrainIds are read where there are any; otherwise the 34 labelIds, of which the 19 classes of the
    benchmark count and the others are ignored. The benchmark's test labels are not public: its val, on which papers
    report, is the test part here, and val is split off train by seed. `protocol="trainval"` trains on all of train.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    if not tasks(existing(root, expected)):
        raise ValueError(f"{root} has no leftImg8bit/train and gtFine/train; {expected}")
    pictures = {
        part: sorted((root / "leftImg8bit" / name).rglob(f"*{PICTURE}"))
        for part, name in PARTS.items()
        if (root / "leftImg8bit" / name).is_dir()
    }
    if not pictures["train"]:
        raise ValueError(f"{root}/leftImg8bit/train holds no files *{PICTURE}; {expected}")
    found = {part: [_mask(root, path, TRAIN_IDS) for path in paths] for part, paths in pictures.items()}
    numbered = any(mask.is_file() for masks in found.values() for mask in masks)
    if not numbered:
        found = {part: [_mask(root, path, IDS) for path in paths] for part, paths in pictures.items()}
    missing = [mask for masks in found.values() for mask in masks if not mask.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} pictures have no mask: {missing[0]} is missing; {expected}")
    parts: dict[str, list[Pair]] = {
        part: list(zip(paths, found[part], strict=True)) for part, paths in pictures.items() if paths
    }
    origin = {"labels": "labelTrainIds" if numbered else "labelIds"} | ({"test": "val"} if "test" in parts else {})
    return mask_splits(parts, _meaning(numbered), options, origin)


def _meaning(numbered: bool) -> Meaning:
    names = list(CLASSES)
    if numbered:
        return Meaning(names, {label: label for label in range(len(names))})
    classes = {id: label for label, id in enumerate(CLASSES.values())}
    return Meaning(names, classes, frozenset(range(LAST_ID + 1)) - classes.keys())


def _mask(root: Path, picture: Path, end: str) -> Path:
    below = picture.relative_to(root / "leftImg8bit")
    return root / "gtFine" / below.with_name(below.name.removesuffix(PICTURE) + end)
