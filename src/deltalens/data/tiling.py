"""Large pictures cut into tiles, as DOTA's development kit cuts them: windows, names, and what objects become.

A picture is resized by a scale and cut into windows of size x size pixels, which begin every size - gap pixels; the
last ones of a row and of a column end at the picture's edge. A tile is called as in the kit, so that official tools
merge results, too: `P0001__1.0__824___0` is the window of P0001 at scale 1 whose upper left corner is x = 824, y = 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from deltalens.data.quadrilaterals import areas_inside, areas_of

CUT = 2  # difficult, of objects that a tile holds too little of; DOTA's own are 0 and 1
SIDES_FROM = 32.0  # mmrotate's names have the side of a window, in source pixels, in the place of the scale
_NAME = re.compile(r"(?P<source>.+?)__(?P<scale>\d+(?:\.\d+)?)__(?P<left>\d+)___(?P<top>\d+)(?P<inner>__\d+_\d+)?")
_PLAIN = re.compile(r"(?P<source>.+?)__(?P<left>\d+)_(?P<top>\d+)")


class Window(NamedTuple):
    """Edges in pixels of the resized picture; right and bottom are behind the last pixel."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Tile:
    """Where a tile lies. left, top: of its upper left corner, in pixels of the source picture resized by `scale`."""

    source: str
    left: int
    top: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        """As the development kit calls it."""
        return f"{self.source}__{float(self.scale)}__{self.left}___{self.top}"

    @classmethod
    def named(cls, name: str) -> Tile | None:
        """The tile of this name, None where the name is not that of a tile.

        Also of mmrotate's names, source__side__left___top, and of source__left_top, alone or behind either: a tile of
        a tile.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            plain = _PLAIN.fullmatch(name)
            return None if plain is None else cls(plain["source"], int(plain["left"]), int(plain["top"]))
        scale = float(found["scale"])
        inner = [int(number) for number in found["inner"][2:].split("_")] if found["inner"] else [0, 0]
        left, top = int(found["left"]) + inner[0], int(found["top"]) + inner[1]
        return cls(found["source"], left, top, 1.0 if scale >= SIDES_FROM or scale == 0 else scale)

    def in_source(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 5) of the tile's pixels in pixels of the source picture."""
        moved = boxes.clone()
        moved[:, :2] += moved.new_tensor([self.left, self.top])
        moved[:, :4] /= self.scale
        return moved


def check_tiling(size: int, gap: int, scales: tuple[float, ...] | list[float], kept_share: float) -> None:
    """ValueError for settings that no tiles can be cut with."""
    if size < 1 or not 0 <= gap < size:
        raise ValueError(f"tiles need a size from 1 pixel and a gap below the size, got {size} and {gap}")
    if not scales or any(not 0 < scale < SIDES_FROM for scale in scales) or len(set(scales)) < len(scales):
        raise ValueError(f"scales are one or more different factors above 0 and below {SIDES_FROM:g}, got {scales}")
    if not 0 <= kept_share <= 1:
        raise ValueError(f"kept_share is a share of an object's area in [0, 1], got {kept_share}")


def starts_of(length: int, size: int, gap: int) -> list[int]:
    """Where the windows along a side of `length` pixels begin: every size - gap, the last one so that it ends there."""
    last = max(length - size, 0)
    return [*range(0, last, size - gap), last]


def windows_of(height: int, width: int, size: int, gap: int) -> list[Window]:
    """The windows of a picture, row by row. Together they cover it; a picture smaller than a tile is one window."""
    return [
        Window(left, top, min(left + size, width), min(top + size, height))
        for top in starts_of(height, size, gap)
        for left in starts_of(width, size, gap)
    ]


def objects_in(
    corners: np.ndarray, difficult: np.ndarray, window: Window, kept_share: float, drop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The objects of a window: their indices (k,), corners (k, 4, 2) in its pixels, and how difficult they are (k,).

    corners: (n, 4, 2) in pixels of the picture. Objects with less than `kept_share` of their area in the window get the
    difficult value 2, or are left out with `drop`. Corners are not cut at the window, so that a box is the same in all
    of its tiles; the kit cuts objects, and fits the rest with four corners.
    """
    low, high = corners.min(1), corners.max(1)
    near = np.flatnonzero((low < np.array(window[2:])).all(1) & (high > np.array(window[:2])).all(1))
    inside, whole = areas_inside(corners[near], window), areas_of(corners[near])
    there = (inside > 0) & ((inside >= kept_share * whole - 1e-6) | (not drop))
    kept = near[there]
    cut = inside[there] < kept_share * whole[there] - 1e-6
    return kept, corners[kept] - np.array(window[:2]), np.where(cut, CUT, difficult[kept])
