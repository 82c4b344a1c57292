"""ModelNet10, see `deltalens.data.modelnet`."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.modelnet import read_modelnet, recognise_modelnet
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits


def recognise(root: Path) -> str | None:
    """ "modelnet10" where its lists or caches are there."""
    return recognise_modelnet(root, 10)


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The formats "modelnet10", "modelnet10/txt" and "modelnet10/cached"."""
    return read_modelnet(root, which, options, 10)
