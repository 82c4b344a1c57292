"""Every picture and mask of a dense dataset looked at once, before training: what is broken, what sizes they have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from deltalens.data.image_folder import BROKEN
from deltalens.data.splits import Splits

LARGE = 100_000  # pictures of a part of which the headers alone are read
ORIENTATION = 0x0112
Size = tuple[int, int]  # height, width
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Looked:
    """One picture file: its size as it is stored, whether EXIF data turns it on its side, and what is broken."""

    stored: Size = (0, 0)
    sideways: bool = False
    problem: str | None = None

    @property
    def upright(self) -> Size:
        return (self.stored[1], self.stored[0]) if self.sideways else self.stored

    def frame_of(self, stated: Size | None) -> bool | None:
        """Whether annotations for a picture of the stated size are in the frame of the stored picture (True) or of the
        upright one (False); None where they are for a picture of another size."""
        if stated is None or stated == self.upright:
            return False
        return True if stated == self.stored else None


def look(path: Path, whole: bool = True) -> Looked:
    """Open a picture, and decode it where `whole`."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            if whole:
                image.draft("RGB", (1, 1))  # JPEG: decode at 1/8 size, which reads the whole file all the same
                image.load()
    except BROKEN as error:
        said = " ".join(str(error).replace(str(path), "").replace("''", "").split())
        return Looked(problem=said or type(error).__name__)
    return Looked((height, width), sideways)


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Pictures of any size, for those that are read by tiles: Pillow takes more than 179 million pixels for an attack,
    and DOTA has pictures of 29,200 x 27,620."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def look_at_all(paths: Sequence[Path]) -> list[Looked]:
    """`look` of every file; of more than `LARGE` files at the headers alone."""
    return in_threads(lambda path: look(path, len(paths) <= LARGE), paths)


def in_threads(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        return list(pool.map(work, items))


def sound(paths: Sequence[Path], looked: Sequence[Looked], skip_broken: bool) -> list[int]:
    """The indices of the files that can be read; ValueError names the others unless they are to be skipped."""
    broken = [i for i, each in enumerate(looked) if each.problem]
    if broken:
        shown = several([f"{paths[i]} ({looked[i].problem})" for i in broken])
        if not skip_broken:
            raise ValueError(
                f"{len(broken)} of {len(paths)} images cannot be read: {shown}. Repair or remove them, or pass "
                "skip_broken (--skip-broken true) to leave them out"
            )
        print(f"left out {len(broken)} of {len(paths)} images that cannot be read: {shown}")
    left_out = set(broken)
    return [i for i in range(len(paths)) if i not in left_out]


def several(messages: Sequence[str], shown: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(messages) - shown} more" if len(messages) > shown else ""
    return "; ".join(messages[:shown]) + more


def size_words(size: Size) -> str:
    """Width first, as people say it."""
    return f"{size[1]} x {size[0]}"


def check_something_to_learn(splits: Splits) -> None:
    """ValueError for training pictures without a single object or class."""
    if not any(bool((np.asarray(label) == 1).any()) for label in splits.train.labels):  # type: ignore[attr-defined]
        raise ValueError("no training picture has anything in it: all of their annotations are empty")
