"""ModelNet40, see `deltalens.data.modelnet`."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.modelnet import read_modelnet, recognise_modelnet
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits


def recognise(root: Path) -> str | None:
    """ "modelnet40" where its lists or caches are there."""
    return recognise_modelnet(root, 40)


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The formats "modelnet40", "modelnet40/txt" and "modelnet40/cached"."""
    return read_modelnet(root, which, options, 40)
