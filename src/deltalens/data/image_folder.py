"""Folders of images, one folder per class: `train/<class>/*.jpg`, or `<class>/*.jpg` split by seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from deltalens.data.broken import without_broken_items
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits, stratified_split

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
EXPECTED = """expected one folder per class, either split already:
    {root}/train/<class>/*.jpg
    {root}/val/<class>/*.jpg
    {root}/test/<class>/*.jpg      (val and test may be absent: val is then split off train by seed)
or not split yet:
    {root}/<class>/*.jpg
(for other layouts see --format: csv, multilabel, hf, vtab1k/<task>, fgvc/<set>, coop/<dataset>, voc2007,
torchvision/<Name>; for masks and boxes masks, ade20k, cityscapes, voc-masks, voc, coco, yolo, dota, rolabelimg; for point
clouds points-folder, scanobjectnn/<variant>, modelnet40)"""
BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UnknownClasses(ValueError):
    """The data has classes that the model does not know."""


class ImageFiles(Dataset):
    """Image files with labels, integers or tensors. Items are (transform(RGB image), label).

    An image that cannot be read raises ValueError with its path. mode: PIL's mode that images are converted to.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[Any], transform: Callable | None = None, mode: str = "RGB"
    ):
        self.paths, self.labels, self.transform, self.mode = list(paths), list(labels), transform, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.labels[index]

    def __add__(self, other: ImageFiles) -> ImageFiles:
        """The items of both, with the transform and the mode of the first."""
        return ImageFiles(self.paths + other.paths, [*self.labels, *other.labels], self.transform, self.mode)

    def image(self, index: int) -> Image.Image:
        """One image as it is read, in `mode`, without the transform."""
        return read_image(self.paths[index], self.mode)

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        """The items at these indices, as a dataset of their own."""
        return ImageFiles(
            [self.paths[i] for i in indices], [self.labels[i] for i in indices], self.transform, self.mode
        )


def read_image(path: str | os.PathLike, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """Read an image, turned upright as its EXIF data says, in PIL's `mode`. Of 16 bits the upper eight are kept.
    ValueError names an unreadable file."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            return _eight_bits(turned).convert(mode)
    except FileNotFoundError:
        raise
    except BROKEN as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def recognise(root: Path) -> str | None:
    """ "folder" where there are split folders with class folders."""
    return "folder" if root.is_dir() and "train" in split_folders(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "folder" of `deltalens.data.read_data`."""
    refuse_variant("folder", which)
    return read_image_folder(
        root,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        skip_broken=options.skip_broken,
        allow_missing_classes=options.allow_missing_classes,
    )


def read_image_folder(
    root: str | os.PathLike,
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 0,
    skip_broken: bool = False,
    allow_missing_classes: bool = False,
) -> Splits:
    """Read train, validation and test images from a folder.

    With `train` (and `val`, `test`) folders those are the splits; a missing val is split off train by `seed`.
    Otherwise the class folders are split by `seed` into all three. Splits are stratified by class. Class names are
    the sorted names of train's class folders. Images may lie deeper inside a class folder; hidden and non-image files
    are passed over.

    Every image is decoded once before training starts: broken ones are an error that names them, or are left out with
    skip_broken. Class folders that differ between splits are an error that lists the differences; with
    allow_missing_classes, val and test may lack some of train's.

    Raises FileNotFoundError for a missing folder, ValueError for everything else. Datasets come without a transform.
    """
    root = _existing(Path(root))
    folders = split_folders(root)
    if not folders:
        everything, names = _read_classes(root, root, None, allow_missing_classes)
        everything = without_broken(everything, skip_broken)
        train, val, test = stratified_split(everything.labels, (val_fraction, test_fraction), seed)
        origin = {"layout": "one folder", "seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
        parts = {"train": everything.subset(train), "val": everything.subset(val), "test": everything.subset(test)}
    else:
        if "train" not in folders:
            raise ValueError(
                f"{root} has {', '.join(f.name for f in folders.values())} but no train folder; {_expected(root)}"
            )
        check_same_classes(folders, allow_missing_classes)
        parts, names = {}, None
        for split, folder in folders.items():
            files, found = _read_classes(folder, root, names, allow_missing_classes)
            names = names or found
            parts[split] = without_broken(files, skip_broken)
        origin = {"layout": "split folders"}
        if "val" not in parts:
            train, val = stratified_split(parts["train"].labels, (val_fraction,), seed)
            parts["train"], parts["val"] = parts["train"].subset(train), parts["train"].subset(val)
            origin |= {"val": "split off train", "seed": seed, "val_fraction": val_fraction}
    for split in ("train", "val"):
        if not len(parts[split]):
            raise ValueError(f"{root} leaves no images for {split}: it needs more images, or larger fractions")
    if len(names) < 2:
        raise ValueError(f"{root} has a single class ({names[0]}); classification needs two. {_expected(root)}")
    test = parts.get("test")
    return Splits(parts["train"], parts["val"], names, test if test is not None and len(test) else None, origin)


def read_split(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    origin: dict[str, Any] | None = None,
    skip_broken: bool = False,
) -> ImageFiles:
    """Read one split to measure a trained model on: "train", "val", "test", or "all" for every image under class
    folders.

    Labels index `class_names`, which is the order of the model's outputs. Classes of the model may be absent here; a
    class folder that the model does not know is a ValueError. origin: `Splits.origin` of the training run, which
    tells how a folder without split folders was split.
    """
    root, origin = _existing(Path(root)), origin or {}
    folders = split_folders(root)
    names, was_split_before = list(class_names), origin.get("layout") == "split folders"
    if split == "all":
        if folders:
            raise ValueError(
                f"{root} has split folders ({', '.join(folders)}): name one of them as the split instead of 'all'"
            )
        return without_broken(_read_classes(root, root, names, True)[0], skip_broken)
    drawn = _drawn_parts(origin)
    if split in drawn and bool(folders) == was_split_before and "val" not in folders:
        whole = without_broken(_read_classes(folders.get("train", root), root, names, True)[0], skip_broken)
        parts = stratified_split(whole.labels, [origin[f"{part}_fraction"] for part in drawn[1:]], origin["seed"])
        return whole.subset(parts[drawn.index(split)])
    if split not in folders:
        found = f"has {', '.join(folders)}" if folders else "holds class folders; pass --split all to use every image"
        raise ValueError(f"{root} has no {split} folder; it {found}")
    files = _read_classes(folders[split], root, names, True)[0]
    return without_broken(files, skip_broken)


def split_folders(root: Path) -> dict[str, Path]:
    """split -> folder, for those of train, val, test that exist and hold class folders."""
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if (root / name).is_dir() and class_folders(root / name):
                found.setdefault(split, root / name)
    return found


def folder_class_names(root: Path) -> list[str]:
    """Class names of a folder of images: those of its train folder, else of its other split folders together, else of
    its own class folders. Errors as in `read_image_folder`."""
    folders = split_folders(_existing(root))
    read = [folders["train"]] if "train" in folders else [*folders.values()] or [root]
    names = {name for folder in read for name in class_folders(folder)}
    if not names:
        raise ValueError(f"{root} holds no class folders; {_expected(root)}")
    return sorted(names)


def image_files(folder: Path) -> list[Path]:
    """Every image file under a folder, sorted; hidden ones passed over."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    return sorted(found)


def without_broken(files: ImageFiles, skip_broken: bool) -> ImageFiles:
    """Decode every image once; broken ones raise ValueError with their names, or are left out and printed."""
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        problems = list(pool.map(_problem, files.paths))
    named = [problem and f"{path} ({problem})" for path, problem in zip(files.paths, problems, strict=True)]
    return without_broken_items(files, named, "images", skip_broken)


# ------------------------------------------------------------------ details
def _drawn_parts(origin: dict[str, Any]) -> list[str]:
    """The parts that were drawn by seed from one folder: none, train and val, or all three."""
    drawn = [part for part in ("val", "test") if f"{part}_fraction" in origin]
    return ["train", *drawn] if drawn else []


def _eight_bits(image: Image.Image) -> Image.Image:
    """PIL itself cuts values above 255 off."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    sixteen = image.mode != "I" or (values.size and values.max() > 255)
    return Image.fromarray((np.clip(values, 0, 65535) >> 8 if sixteen else values).astype(np.uint8))


def _problem(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # JPEG: decode at 1/8 size, which reads the whole file all the same
            image.load()
    except BROKEN as error:
        return " ".join(str(error).replace(str(path), "").replace("''", "").split()) or type(error).__name__
    return None


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}; {_expected(root)}")
    return root


def _expected(root: Path) -> str:
    return EXPECTED.format(root=root)


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, hidden ones passed over."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_classes(
    folder: Path, root: Path, class_names: list[str] | None, may_be_empty: bool
) -> tuple[ImageFiles, list[str]]:
    """All images of a folder of class folders, and the class names. class_names: the known ones, or None to find
    them."""
    present = class_folders(folder)
    if not present:
        raise ValueError(f"{folder} holds no class folders; {_expected(root)}")
    _refuse_splits_inside(folder, present, root)
    names = class_names or present
    unknown = [name for name in present if name not in names]
    if unknown:
        raise UnknownClasses(
            f"{folder} has class folders that are not among the {len(names)} known classes: {_some(unknown)}; "
            f"known: {_some(names)}"
        )
    paths, labels, empty = [], [], []
    for name in present:
        images = image_files(folder / name)
        if not images:
            empty.append(name)
        paths += images
        labels += [names.index(name)] * len(images)
    if not paths:
        raise ValueError(
            f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))}) in its class folders {_some(present)}; "
            f"{_expected(root)}"
        )
    if empty and not (may_be_empty and class_names):
        raise ValueError(f"class folders without images in {folder}: {_some(empty)}; {_expected(root)}")
    return ImageFiles(paths, labels), names


def _refuse_splits_inside(folder: Path, names: list[str], root: Path) -> None:
    """Images of another task often lie as images/train, labels/train: those are no classes."""
    if all(any((folder / name / split).is_dir() for split in SPLIT_FOLDERS["train"]) for name in names):
        raise ValueError(
            f"{folder} has train folders inside {_some(names)}, so that these are no class folders; {_expected(root)}"
        )


def check_same_classes(folders: dict[str, Path], allow_missing: bool) -> None:
    """ValueError where the class folders of the parts (name -> folder) differ from train's."""
    train = set(class_folders(folders["train"]))
    differences = []
    for split in [split for split in folders if split != "train"]:
        here = set(class_folders(folders[split]))
        if here - train:
            differences.append(f"only in {split}: {_some(sorted(here - train))}")
        if train - here and not allow_missing:
            differences.append(f"in train but not in {split}: {_some(sorted(train - here))}")
    if differences:
        raise ValueError(
            f"the class folders of {folders['train'].parent} differ between splits. {'; '.join(differences)}. Rename "
            "or complete the folders; where val or test really lack a class, pass allow_missing_classes "
            "(--allow-missing-classes true)"
        )


def _some(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
