"""The ships of `obb/dota_tiles`, so split that what is tested can be learnt.

Nearly all objects of the set's own test part are of a class that its training part does not have. Here both parts have
ships: those of one aerial picture to train with, those of another one to test with. Everything else is left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deltalens.data.tile_folders import Tiling, tile_folder

SHIP, EDGE = "ship", 256
TRAIN_PICTURE = "P0706"
TEST_TILES = ("P0861__1024__0___1648__0_0", "P0861__1024__0___1648__512_0", "P0861__1024__0___1648__512_512")
# Three tiles of the other picture that share no pixel. Ships of the first are half as long, so it is enlarged twice.
PARTS = {"train": Tiling(EDGE, 0, scales=(2.0,)), "test": Tiling(EDGE, 0)}


def write_ships(tiles: Path, target: Path) -> Path:
    """`<target>/<part>/images` and `labelTxt` of tiles of 256 pixels; left alone where it is there already."""
    if target.is_dir():
        return target
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, tiling in PARTS.items():
        chosen = unfinished / "chosen" / part
        _copy_ships(tiles / "train", chosen / part, part)
        tile_folder(chosen, unfinished / "cut" / part, tiling)
        os.replace(unfinished / "cut" / part / part, unfinished / part)
    shutil.rmtree(unfinished / "chosen")
    shutil.rmtree(unfinished / "cut")
    os.replace(unfinished, target)
    return target


def _copy_ships(source: Path, target: Path, part: str) -> None:
    """The pictures of a part, and of their labels the ships."""
    (target / "labelTxt").mkdir(parents=True)
    (target / "images").mkdir()
    for picture in sorted((source / "images").iterdir()):
        if not (picture.stem.startswith(TRAIN_PICTURE) if part == "train" else picture.stem in TEST_TILES):
            continue
        shutil.copyfile(picture, target / "images" / picture.name)
        label = f"{picture.stem}.txt"
        lines = (source / "labelTxt" / label).read_text(encoding="utf-8").splitlines()
        ships = [line for line in lines if line.split()[8:9] == [SHIP]]
        (target / "labelTxt" / label).write_text("".join(f"{line}\n" for line in ships), encoding="utf-8")
