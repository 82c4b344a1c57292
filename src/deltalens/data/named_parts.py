"""A part of the data with the data's own classes, for models that take any classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deltalens.data.assemble import Images
from deltalens.data.formats import part_of, read_data, read_part, recognise
from deltalens.data.image_folder import folder_class_names
from deltalens.data.options import ReadOptions


def read_named_part(
    root: str | os.PathLike,
    split: str,
    format: str | None = None,
    origin: dict[str, Any] | None = None,
    skip_broken: bool = False,
    download: bool = False,
    subset: str | None = None,
) -> tuple[Images, list[str], str]:
    """(images, class names, task) of "train", "val", "test" or "all". Labels index the names, which are the data's.

    format: None or "auto" goes by the files. origin: `Splits.origin` of the training run for a part of that same data;
    without it a folder that is not split has the part "all" only. subset: "base" or "new" classes of the
    data. Errors as in `deltalens.data.read_part`.
    """
    origin, root = origin or {}, Path(root).expanduser()
    if format in (None, "auto"):
        format = recognise(root) or "folder"
    if format == "folder" and subset in (None, "all"):
        names = folder_class_names(root)
        return read_part(root, split, names, origin, format, skip_broken, download), names, "classification"
    drawn = {key: origin[key] for key in ("val_fraction", "test_fraction", "seed") if key in origin}
    options = ReadOptions(
        **drawn, skip_broken=skip_broken, allow_missing_classes=True, download=download, subset=subset or "all"
    )
    splits = read_data(root, format, options=options)
    return part_of(splits, split, root), list(splits.class_names), splits.task
