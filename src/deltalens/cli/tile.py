"""Cut large pictures with oriented boxes into tiles: a folder in DOTA's layout becomes another one.

Windows of --size pixels begin every size - gap pixels, the last ones end at the picture's edge. Tiles are called as
DOTA's development kit calls them (P0001__1.0__824___0), so that results are merged to those of the pictures. Objects
of which a tile holds less than --kept-share are marked as difficult, or left out with --drop-cut. A test part without
labels is cut, too. The same command goes on where it was stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("data", type=str, help="folder with train/images, train/labelTxt, and so on, or with images and labelTxt")
    add("--output", type=str, required=True, metavar="DIR", help="empty folder for the tiles")
    add("--size", type=int, default=1024, help="edge of a tile in pixels")
    add("--gap", type=int, default=200, help="pixels that neighbouring tiles share")
    add("--scales", type=list[float], default=[1.0], help="factors that pictures are resized by before, [0.5,1,1.5]")
    add("--kept-share", type=float, default=0.7, help="share of its area that an object must have in a tile")
    add("--drop-cut", type=bool, default=False, help="leave out objects with less, instead of marking them difficult")
    add("--empty", type=bool, default=True, help="also write tiles without any object, where there are labels")
    add("--format", type=Literal["png", "jpg"], default="png", help="of the tiles' files")
    add("--labels", type=Literal["v1.0", "v1.5", "v2.0"] | None, default=None, help="version of the labels, of several")
    add("--workers", type=int | None, default=None, help="pictures at a time; by default a core each, at most 4")


def run(args: Namespace) -> None:
    """Cut and say how many tiles there are."""
    from pathlib import Path

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from deltalens.data.tile_folders import Large, Tiling, default_workers, tile_folder

    tiling = Tiling(
        args.size, args.gap, tuple(args.scales), args.kept_share, args.drop_cut, args.format, args.empty
    )  # fmt: skip
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cutting", total=None)

        def show(done: int, total: int, large: Large) -> None:
            progress.update(bar, completed=done, total=total, description=large.picture.name)

        root, output = Path(args.data).expanduser(), Path(args.output).expanduser()
        workers = default_workers() if args.workers is None else args.workers
        counts = tile_folder(root, output, tiling, workers, args.labels or "", show)
    for part, count in counts.items():
        print(f"{part}: {count['pictures']} pictures, {count['tiles']} tiles, {count['objects']} objects in them")
    print(f"tiles are in {output}")
