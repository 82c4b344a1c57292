"""A DOTA folder of large pictures written as a DOTA folder of tiles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from deltalens.data.assemble import existing
from deltalens.data.class_lists import class_list
from deltalens.data.dense_checks import any_size, look
from deltalens.data.dota_txt import EXPECTED, Lines, folders, label_pairs, read_lines
from deltalens.data.image_folder import image_files, read_image
from deltalens.data.tiling import Tile, Window, check_tiling, objects_in, windows_of
from deltalens.lifecycle.atomic import atomic_path, remove_leftovers, write_text

SETTINGS = "tiling.json"  # in the folder of tiles, written before them
FINISHED = "info.json"  # written behind them
QUALITY = 95  # of JPEG files
PNG_EFFORT = 3  # zlib's level: files a little larger than at its 6, written in half the time


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut. size, gap: in pixels. scales: that pictures are resized by before. kept_share: objects with
    less of their area in a tile become difficult, or are left out with `drop`. format: of the tiles' files. empty:
    whether tiles without any object are written where there are labels. Raises ValueError for what cannot be."""

    size: int = 1024
    gap: int = 200
    scales: tuple[float, ...] = (1.0,)
    kept_share: float = 0.7
    drop: bool = False
    format: Literal["png", "jpg"] = "png"
    empty: bool = True

    def __post_init__(self) -> None:
        check_tiling(self.size, self.gap, self.scales, self.kept_share)


@dataclass(frozen=True)
class Large:
    """One picture to cut, its labels where there are any, and the folder of the part that its tiles go to."""

    picture: Path
    labels: Path | None
    folder: Path


def tile_folder(
    root: Path,
    output: Path,
    tiling: Tiling = Tiling(),
    workers: int = 1,
    version: str = "",
    show: Callable[[int, int, Large], None] = lambda done, total, large: None,
) -> dict[str, dict[str, int]]:
    """Cut all pictures of a DOTA folder. part -> {"pictures": ..., "tiles": ..., "objects": ...}

    Writes `<part>/images`, and `<part>/labelTxt` where there are labels, below `output`, and the names of the classes
    into info.json at the end. Every file is written whole or not at all; called again with the same settings after it
    was stopped, only pictures that lack tiles are cut. workers: pictures at a time, each in memory whole. version: of
    the labels, as in the format "dota". show: called with what is done and what there is to do.

    Raises FileNotFoundError or ValueError with the expected tree for another layout, ValueError for an output that
    holds something else, for two pictures of one name, and for pictures and labels that cannot be read.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    expected = EXPECTED.format(root=root)
    found = folders(existing(root, expected), version)
    if not found:
        raise ValueError(f"{root} has no folders of images; {expected}")
    if version and all(labels is None for _, labels in found.values()):
        raise ValueError(f"{root} has no labels of the version {version}, in no part; {expected}")
    names = _class_names(root, found)
    _prepare(output, root, tiling)
    works = [
        Large(picture, labels, output if part == "all" else output / part)
        for part, (pictures, label_folder) in found.items()
        for picture, labels in _pairs(pictures, label_folder, expected)
    ]
    _refuse_same_names(works)
    counts = {part: {"pictures": 0, "tiles": 0, "objects": 0} for part in found}
    with any_size(), ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(tile_picture, each, tiling) for each in works]
        try:
            for done, (job, each) in enumerate(zip(jobs, works, strict=True), 1):
                count = counts["all" if each.folder == output else each.folder.name]
                tiles, objects = job.result()
                for name, more in (("pictures", 1), ("tiles", tiles), ("objects", objects)):
                    count[name] += more
                show(done, len(works), each)
        finally:
            pool.shutdown(cancel_futures=True)
    said = {"format": "DOTA labelTxt", "classes": names, "tiling": asdict(tiling), "parts": counts}
    write_text(output / FINISHED, json.dumps(said, indent=1) + "\n")
    return counts


def tile_picture(large: Large, tiling: Tiling) -> tuple[int, int]:
    """Cut one picture: the numbers of tiles and of objects in them. It is decoded only where a tile is missing."""
    lines = None if large.labels is None else read_lines(large.labels)
    looked = look(large.picture, whole=False)
    if looked.problem:
        raise ValueError(f"cannot read the image {large.picture}: {looked.problem}")
    height, width = looked.upright
    picture: Image.Image | None = None
    tiles = objects = 0
    for scale in tiling.scales:
        sides = (max(1, round(width * scale)), max(1, round(height * scale)))
        resized: Image.Image | None = None
        for window in windows_of(sides[1], sides[0], tiling.size, tiling.gap):
            name = Tile(large.picture.stem, window.left, window.top, scale).name
            text, amount = ("", 0) if lines is None else _labels(lines, scale, window, tiling)
            if lines is not None and not amount and not tiling.empty:
                continue
            tiles, objects = tiles + 1, objects + amount
            file = large.folder / "images" / f"{name}.{tiling.format}"
            if not file.is_file():
                picture = picture or read_image(large.picture)
                if resized is None:
                    resized = picture if picture.size == sides else picture.resize(sides, Image.Resampling.BICUBIC)
                _save(resized.crop(window), file, tiling.format)
            if lines is not None:
                label = large.folder / "labelTxt" / f"{name}.txt"
                if not label.is_file():
                    write_text(label, text)
    return tiles, objects


def _labels(lines: Lines, scale: float, window: Window, tiling: Tiling) -> tuple[str, int]:
    """The text of a tile's label file, and how many objects it has."""
    corners = lines.corners.reshape(-1, 4, 2) * scale
    kept, moved, difficult = objects_in(corners, np.array(lines.difficult, int), window, tiling.kept_share, tiling.drop)
    rows = [
        f"{' '.join(f'{value:.1f}' for value in points.reshape(-1))} {lines.names[i]} {hard}\n"
        for i, points, hard in zip(kept, moved, difficult, strict=True)
    ]
    return "".join(rows), len(rows)


def _save(tile: Image.Image, file: Path, format: str) -> None:
    with atomic_path(file) as temporary, open(temporary, "wb") as stream:
        if format == "png":
            tile.save(stream, "PNG", compress_level=PNG_EFFORT)
        else:
            tile.save(stream, "JPEG", quality=QUALITY)


def _pairs(pictures: Path, labels: Path | None, expected: str) -> list[tuple[Path, Path | None]]:
    if labels is None:
        return [(path, None) for path in image_files(pictures)]
    return [(path, file) for path, file in label_pairs(pictures, labels, expected)]


def _class_names(root: Path, found: dict[str, tuple[Path, Path | None]]) -> list[str]:
    """Those of a file of names, otherwise of all objects in train and val: a part of the tiles may lack some."""
    listed = class_list(root)
    if listed is not None:
        return listed.names
    files = [file for part, (_, labels) in found.items() if labels and part != "test" for file in labels.glob("*.txt")]
    return sorted({name for file in files for name in read_lines(file).names})


def _prepare(output: Path, root: Path, tiling: Tiling) -> None:
    """An empty folder, or one that the same call has begun. ValueError for another."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: tiles need a folder")
    said = {"data": str(root.resolve()), **asdict(tiling)}
    said["scales"] = list(tiling.scales)
    if output.exists() and any(output.iterdir()):
        file = output / SETTINGS
        if not file.is_file() or json.loads(file.read_text()) != said:
            raise ValueError(
                f"{output} is not empty, and what it holds is not from the same pictures and settings: give another "
                "folder, or remove it"
            )
        for folder in {path.parent for path in output.rglob(".*.tmp")}:
            remove_leftovers(folder)
    write_text(output / SETTINGS, json.dumps(said, indent=1) + "\n")


def _refuse_same_names(works: list[Large]) -> None:
    """ValueError for two pictures of one part whose tiles would have one name."""
    seen: dict[tuple[Path, str], Path] = {}
    for each in works:
        other = seen.setdefault((each.folder, each.picture.stem), each.picture)
        if other != each.picture:
            raise ValueError(f"{other} and {each.picture} have one name, and so would their tiles: rename one of them")


def default_workers() -> int:
    """Pictures at a time: one for each core, at most four, since each is in memory whole."""
    return min(4, os.cpu_count() or 1)
