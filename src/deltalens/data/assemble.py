"""From the parts that a reader found to `Splits`: what every format does alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalens.data.clouds import Clouds, without_broken_clouds
from deltalens.data.dense_items import DenseImages
from deltalens.data.image_folder import ImageFiles, without_broken
from deltalens.data.image_items import ImageItems
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits, strata, stratified_split

Images = ImageFiles | ImageItems | Clouds | DenseImages
ONE_CLASS = ("multilabel", "detection", "instance", "oriented")  # tasks that a single class makes sense for


def assemble(
    parts: Mapping[str, Images],
    class_names: Sequence[str],
    options: ReadOptions,
    origin: dict[str, Any],
    task: str = "classification",
) -> Splits:
    """Splits from "train" and perhaps "val" and "test", or from "all", which is split by seed into the three.

    A missing val is split off train by seed, stratified by class (of several classes by the rarest). Files are decoded
    once, and clouds checked; dense images are checked where they are made. Raises ValueError for parts or classes that
    are too few.
    """
    parts = {split: _readable(images, options.skip_broken) for split, images in parts.items()}
    origin = dict(origin)
    if "all" in parts:
        everything = parts["all"]
        drawn = stratified_split(strata(everything.labels), (options.val_fraction, options.test_fraction), options.seed)
        parts = dict(zip(("train", "val", "test"), map(everything.subset, drawn), strict=True))
        origin |= {"seed": options.seed, "val_fraction": options.val_fraction, "test_fraction": options.test_fraction}
    elif "val" not in parts:
        train, val = stratified_split(strata(parts["train"].labels), (options.val_fraction,), options.seed)
        parts["train"], parts["val"] = parts["train"].subset(train), parts["train"].subset(val)
        origin |= {"val": "split off train", "seed": options.seed, "val_fraction": options.val_fraction}
    for split in ("train", "val"):
        if not len(parts[split]):
            raise ValueError(
                f"the data leaves no images or clouds for {split}: it needs more of them, or larger fractions"
            )
    if len(class_names) < (1 if task in ONE_CLASS else 2):
        raise ValueError(f"the data has too few classes ({', '.join(class_names) or 'none'}) for {task}")
    test = parts.get("test")
    test = test if test is not None and len(test) else None
    return Splits(parts["train"], parts["val"], list(class_names), test, origin, task)


def _readable(images: Images, skip_broken: bool) -> Images:
    if isinstance(images, Clouds):
        return without_broken_clouds(images, skip_broken)
    return without_broken(images, skip_broken) if isinstance(images, ImageFiles) else images


def existing(folder: Path, expected: str) -> Path:
    """The folder, or FileNotFoundError with the tree that is expected."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}; {expected}")
    return folder


def listed_images(paths: Sequence[Path], where: Path, expected: str) -> list[Path]:
    """The paths, or ValueError where files that a list names are not there."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images listed in {where} are missing: {shown}; {expected}"
        )
    return list(paths)


def number_names(labels: Sequence[int], where: Path) -> list[str]:
    """The names of classes that are known by number only. ValueError for negative ones."""
    if labels and min(labels) < 0:
        raise ValueError(f"{where} has the label {min(labels)}; labels are numbers from 0")
    return [str(label) for label in sorted(set(labels))]
