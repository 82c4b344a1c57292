"""The ships of `obb/dota_tiles`, so split that what is tested can be learnt.

Nearly all objects of the set's own test part are of a class that its training part does not have. Here both parts have
ships: those of one aerial picture to train with, and to test with those of another one (`write_ships`) or those at the
right edge of the same one (`write_harbour`). Everything else is left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deltalens.data.tile_folders import Tiling, tile_folder

SHIP, EDGE = "ship", 256
TWICE, ONCE = Tiling(EDGE, 0, scales=(2.0,)), Tiling(EDGE, 0)
HARBOUR = "P0706"  # a picture of 1111 x 1182 pixels, of which the set has overlapping tiles of 512
OTHER = ("P0861__1024__0___1648__0_0", "P0861__1024__0___1648__512_0", "P0861__1024__0___1648__512_512")
LEFT, RIGHT = ("P0706__0_", "P0706__412_"), ("P0706__599_0", "P0706__599_670")
LAST_COLUMN = "*__768___*"  # of tiles of an enlarged tile: 128 pixels at its right edge, which no tile of LEFT reaches


def write_ships(tiles: Path, target: Path) -> Path:
    """Train: one picture, enlarged twice. Test: three disjoint tiles of another, in which ships are twice as long.
    `<target>/<part>/images` and `labelTxt` of tiles of 256 pixels; left alone where it is there already."""
    return target if target.is_dir() else _write(tiles, target, (HARBOUR,), OTHER, ONCE)


def write_harbour(tiles: Path, target: Path) -> Path:
    """Train: the left 924 pixels of one picture. Test: its right 128. All enlarged twice; otherwise as
    `write_ships`."""
    return target if target.is_dir() else _write(tiles, target, LEFT, RIGHT, TWICE, LAST_COLUMN)


def _write(
    tiles: Path, target: Path, train: tuple[str, ...], test: tuple[str, ...], tiling: Tiling, tested: str = "*"
) -> Path:
    """train, test: what names of tiles begin with. tiling: of the test part. tested: which of the cut tiles it has."""
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, names, cut in (("train", train, TWICE), ("test", test, tiling)):
        _copy_ships(tiles / "train", unfinished / "chosen" / part / part, names)
        tile_folder(unfinished / "chosen" / part, unfinished / "cut" / part, cut)
        os.replace(unfinished / "cut" / part / part, unfinished / part)
    for folder in ("images", "labelTxt"):
        kept = set((unfinished / "test" / folder).glob(tested))
        for file in set((unfinished / "test" / folder).iterdir()) - kept:
            file.unlink()
    shutil.rmtree(unfinished / "chosen")
    shutil.rmtree(unfinished / "cut")
    os.replace(unfinished, target)
    return target


def _copy_ships(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """The pictures whose names begin so, and of their labels the ships."""
    (target / "labelTxt").mkdir(parents=True)
    (target / "images").mkdir()
    for picture in sorted((source / "images").iterdir()):
        if not picture.stem.startswith(names):
            continue
        shutil.copyfile(picture, target / "images" / picture.name)
        label = f"{picture.stem}.txt"
        lines = (source / "labelTxt" / label).read_text(encoding="utf-8").splitlines()
        ships = [line for line in lines if line.split()[8:9] == [SHIP]]
        (target / "labelTxt" / label).write_text("".join(f"{line}\n" for line in ships), encoding="utf-8")
