"""Formats: which reader makes `Splits` of what lies on a disk.

A format is one module of this folder with

* `recognise(root) -> str | None`: the format's name, with its variant where it has them, if `root` is laid out so;
* `read(root, which, options) -> Splits`: which is the variant, the part after "/" in `--format NAME/VARIANT`, or "".

`FORMATS` names them in the order in which the format "auto" asks them: the particular ones first. Formats of dense
tasks also have `tasks(root)`, see `deltalens.data.dense_formats`.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from deltalens.data.assemble import Images
from deltalens.data.dense_formats import DENSE_FORMATS, DENSE_TASKS, dense_format, dense_task
from deltalens.data.dense_items import DenseImages
from deltalens.data.image_folder import UnknownClasses, read_split
from deltalens.data.options import ReadOptions
from deltalens.data.selection import select, subset_classes
from deltalens.data.splits import Splits
from deltalens.data.subsets import TrainingSubset

FORMATS = {
    "vtab1k": "deltalens.data.vtab1k",
    "voc2007": "deltalens.data.voc2007",
    "fgvc": "deltalens.data.fgvc",
    "hf": "deltalens.data.hf_datasets",
    "scanobjectnn": "deltalens.data.scanobjectnn",
    "modelnet40": "deltalens.data.modelnet40",
    "modelnet10": "deltalens.data.modelnet10",
    "points-few-shot": "deltalens.data.points_few_shot",
    "points-folder": "deltalens.data.points_folder",
    **DENSE_FORMATS,
    "folder": "deltalens.data.image_folder",
    "coop": "deltalens.data.coop",
    "csv": "deltalens.data.csv_table",
    "multilabel": "deltalens.data.multilabel_table",
    "torchvision": "deltalens.data.torchvision_sets",
}
PROTOCOLS = ("val", "trainval")
TASKS = ("classification", "multilabel", *DENSE_TASKS)


def read_data(
    root: str | os.PathLike,
    format: str = "auto",
    *,
    task: str | None = None,
    protocol: str = "val",
    options: ReadOptions = ReadOptions(),  # noqa: B008  (frozen)
) -> Splits:
    """Read train, validation and test images, or clouds, of any format. Datasets come without a transform.

    format: "auto" finds it by the files; otherwise "folder", "csv", "multilabel", "hf", "vtab1k/<task>", "fgvc/<set>",
    "coop/<dataset>", "coop", "voc2007", "voc2007/single" or "torchvision/<Name>"; of point clouds "points-folder",
    "scanobjectnn/<variant>", "modelnet40", "modelnet10" or "points-few-shot/<fold>"; of dense tasks "voc", "coco",
    "yolo", "dota", "rolabelimg", "masks", "ade20k", "cityscapes" or "voc-masks". task: "segmentation", "detection",
    "instance" or "oriented", where a folder serves several; None for the one that it serves. protocol: "val" trains on
    train and keeps val; "trainval" trains on both and has no val. `Splits.origin` says what was read: "format", for
    dense data "task", and "shots", "shots_seed", "shots_from" and "class_subset" where the options chose some of it.
    Data with test images only (the variants of ImageNet) has an empty train.

    Raises FileNotFoundError or ValueError with the expected tree where the layout is another, ValueError where a folder
    serves several tasks and none is asked for.
    """
    task = task or options.task
    if task not in (None, *TASKS):
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; there are {' and '.join(PROTOCOLS)}")
    subset_classes(2, options.subset)
    if protocol == "trainval" and options.shots is not None:
        raise ValueError("shots are drawn for train and for val, and the protocol trainval would join them: use val")
    root = Path(root).expanduser()
    if format == "auto":
        format = recognise(root, task) or "folder"
    module, which = _reader(format)
    options = replace(options, task=_task_of(format, root, task))
    splits = select(module.read(root, which, options), options)
    splits = replace(splits, origin={"format": format} | splits.origin)
    if protocol == "trainval" and splits.val is None:
        raise ValueError(f"{root} has no val part to train on: use the protocol val")
    return splits.joined() if protocol == "trainval" else splits


def read_part(
    root: str | os.PathLike,
    split: str,
    class_names: Sequence[str],
    origin: dict[str, Any] | None = None,
    format: str | None = None,
    skip_broken: bool = False,
    download: bool = False,
    subset: str | None = None,
    task: str | None = None,
) -> Images:
    """Read one part to measure a trained model on: "train", "val", "test", or "all".

    Labels index `class_names`, the model's. origin: `Splits.origin` of the training run, which tells how the parts were
    drawn, which training images were used, and the format where `format` is None. subset: "all", "base" or "new"
    classes; None for the training run's. task: as in `read_data`; None for the training run's. Raises ValueError for
    classes that the model does not know, and for a part that the data does not have.
    """
    origin = origin or {}
    task = task or origin.get("task")
    sampled = "shots" in origin and split in ("train", "val")
    root = Path(root).expanduser()
    if format in (None, "auto"):
        format = origin.get("format", "auto") if format is None else "auto"
        format = (recognise(root, task) or "folder") if format == "auto" else format
    used = TrainingSubset.of_origin(origin) if split == "train" else TrainingSubset()
    if format == "folder" and not sampled and not (subset or "class_subset" in origin):
        return used.of(_folder_part(root, split, class_names, origin, skip_broken))
    drawn: dict[str, Any] = {key: origin[key] for key in ("val_fraction", "test_fraction", "seed") if key in origin}
    if sampled:
        drawn |= {key: origin[key] for key in ("shots", "shots_seed")}
        drawn["stored_shots"] = origin["shots_from"] != "drawn"
    options = ReadOptions(
        **drawn, skip_broken=skip_broken, allow_missing_classes=True, download=download, subset=subset or "all"
    )
    splits = read_data(root, format, task=task, protocol=origin.get("protocol", "val"), options=options)
    if subset is None:
        of_the_run = origin.get("class_subset", "all")
        names = [splits.class_names[label] for label in subset_classes(len(splits.class_names), of_the_run)]
        if names == list(class_names):  # otherwise other data, which is read whole
            splits = select(splits, replace(options, subset=of_the_run))
    return _with_labels_of(class_names, splits, used.of(part_of(splits, split, root)))


def recognise(root: Path, task: str | None = None) -> str | None:
    """The format that a folder or file is laid out in, None where none is certain of it. task: of dense tasks the one
    that is wanted. Raises ValueError as `dense_format` does."""
    if task in DENSE_TASKS:
        return dense_format(root, task)
    for name, module in FORMATS.items():
        if task is not None and name in DENSE_FORMATS:
            continue
        found = importlib.import_module(module).recognise(root)
        if found:
            return dense_format(root, None) if name in DENSE_FORMATS else found
    return None


def _task_of(format: str, root: Path, task: str | None) -> str | None:
    """The dense task that is read, None for other data. ValueError for a task that the format is not for."""
    name = format.partition("/")[0]
    if name in DENSE_FORMATS:
        return dense_task(name, root, task)
    if task in DENSE_TASKS:
        dense = ", ".join(DENSE_FORMATS)
        raise ValueError(f"the format {format} has one label or several for each input; {task} needs one of {dense}")
    return None


def _reader(format: str) -> tuple[ModuleType, str]:
    """(module, variant) of a format's name."""
    name, _, which = format.partition("/")
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=2) or ["auto", *sorted(FORMATS)]
        raise ValueError(f"unknown format {format!r}; did you mean {' or '.join(near)}?")
    return importlib.import_module(FORMATS[name]), which


def _folder_part(root: Path, split: str, class_names: Sequence[str], origin: dict[str, Any], skip: bool) -> Images:
    """A part of class folders. Where the training run joined train and val, they are one here, too."""
    if origin.get("protocol") == "trainval" and split == "val":
        raise ValueError(f"{root} has no val part here: the adapter was trained on it; it has train, test")
    part = read_split(root, split, class_names, origin, skip)
    if origin.get("protocol") == "trainval" and split == "train":
        return part + read_split(root, "val", class_names, origin, skip)
    return part


def part_of(splits: Splits, split: str, root: Path) -> Images:
    """One part of the data, or "all" of them together. ValueError for one that is not there."""
    if split == "all":
        parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
        return sum(parts[1:], parts[0])
    part = getattr(splits, split)
    if part is None or not len(part):
        others = [name for name in ("train", "val", "test") if getattr(splits, name)]
        raise ValueError(f"{root} has no {split} part here; it has {', '.join(others)}")
    return part


def _with_labels_of(class_names: Sequence[str], splits: Splits, part: Images) -> Images:
    """The part with labels that index the model's class names."""
    names = list(class_names)
    if splits.class_names == names:
        return part
    unknown = [name for name in splits.class_names if name not in names]
    if unknown:
        shown = ", ".join(unknown[:8])
        raise UnknownClasses(f"the data has other classes than the {len(names)} of the model: {shown}")
    same = [name for name in splits.class_names if names.count(name) > 1]
    if same:
        raise ValueError(f"several classes of the model are called {same[0]!r}: the data must have all of its classes")
    index = [names.index(name) for name in splits.class_names]
    if isinstance(part, DenseImages):
        return part.renumbered(index, len(names))
    part = part.subset(range(len(part)))
    if splits.task != "multilabel":
        part.labels = [index[label] for label in part.labels]
        return part
    absent = -1 if splits.origin["format"] == "multilabel" else 0  # there a class without a column is not known
    labels = torch.full((len(part), len(names)), absent, dtype=torch.int8)
    labels[:, index] = torch.stack(part.labels)
    part.labels = list(labels)
    return part
