"""Oriented boxes that were found, as rows of tables and as the files of DOTA's evaluation server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalens.studies.dense_measure import Found
    from deltalens.tasks import Detection

BOX = ("cx", "cy", "w", "h", "angle_degrees")
CORNERS = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")
HEADER = f"  {'class':<16} {'score':>6}  " + " ".join(f"{name:>7}" for name in ("cx", "cy", "w", "h", "degrees"))


def corners(one: Detection) -> list[tuple[float, float]]:
    """The four corners, around the box."""
    import torch

    from deltalens.models.oriented_boxes import corners_of

    assert one.oriented is not None
    return [(x, y) for x, y in corners_of(torch.tensor(one.oriented, dtype=torch.float64)).tolist()]


def in_degrees(one: Detection) -> tuple[float, ...]:
    """(cx, cy, w, h, angle) in pixels and degrees."""
    assert one.oriented is not None
    return (*one.oriented[:4], math.degrees(one.oriented[4]))


def csv_row(one: Detection) -> list[str]:
    """Box and corners as the columns `BOX` and `CORNERS`."""
    return [f"{number:.2f}" for number in (*in_degrees(one), *(side for point in corners(one) for side in point))]


def json_entry(one: Detection) -> dict[str, Any]:
    """ "oriented" with cx, cy, w, h and angle_degrees, and "corners"."""
    return {"oriented": dict(zip(BOX, in_degrees(one), strict=True)), "corners": [list(each) for each in corners(one)]}


def table_row(one: Detection) -> str:
    return f"  {one.name:<16} {one.score:6.1%}  " + " ".join(f"{number:7.1f}" for number in in_degrees(one))


def write_dota(found: Iterable[Found], names: list[str], folder: Path) -> int:
    """`Task1_<class>.txt` for every class, with lines `picture score x1 y1 x2 y2 x3 y3 x4 y4`; the number of pictures.

    As DOTA's evaluation server takes them for its Task 1. A picture is its file's name without the suffix. A class that
    was not found has an empty file. Raises ValueError for two pictures of one name, and for a class that cannot be in a
    file's name; nothing is written then.
    """
    from deltalens.lifecycle.atomic import write_text

    unfit = [name for name in names if "/" in name or "\\" in name]
    if unfit:
        raise ValueError(f"the class {unfit[0]!r} cannot be in the name of a file: use --format csv or json")
    lines: dict[str, list[str]] = {name: [] for name in names}
    seen: dict[str, str] = {}
    for each in found:
        stem = Path(each.name).stem
        if stem in seen:
            raise ValueError(f"{seen[stem]} and {each.name} are both called {stem}: DOTA's files tell pictures by that")
        seen[stem] = each.name
        for one in each.detections:
            points = " ".join(f"{side:.2f}" for point in corners(one) for side in point)
            lines[one.name].append(f"{stem} {one.score:.6f} {points}\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        write_text(folder / f"Task1_{name}.txt", "".join(rows))
    return len(seen)
