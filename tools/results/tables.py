"""The tables of docs/results.md."""

from __future__ import annotations

from .adapters import Adapters
from .clouds import write_clouds
from .ships import write_harbour, write_ships
from .study import Table

TABLES = {
    table.name: table
    for table in (
        Table(
            "methods",
            {"signs": "cls/sign_digits"},
            "1 h 50 min",
            {"parameters": "Test accuracy against trained parameters"},
        ),
        Table(
            "ablations",
            {"signs": "cls/sign_digits"},
            "25 min",
            {"curves": "Test accuracy over prompts, prompted blocks, and bottleneck"},
        ),
        Table(
            "two-tasks",
            {"grocery": "cls/grocery43", "caltech": "cls/caltech101"},
            "40 min",
            {"tasks": "Test accuracy on groceries against that on objects"},
            kept_features=True,
        ),
        Table(
            "data-fraction",
            {"signs": "cls/sign_digits"},
            "20 min",
            {"images": "Test accuracy over training images"},
        ),
        Table(
            "clip",
            {"caltech": "cls/caltech101"},
            "1 h",
            {"halves": "Test accuracy on novel classes against that on base classes"},
        ),
        Table(
            "adapter-x",
            {"signs": "cls/sign_digits", "grocery": "cls/grocery43"},
            "30 min",
            {},
        ),
        Table(
            "clouds",
            {"modelnet10": "points/modelnet10_voxels"},
            "50 min",
            {"parameters": "Test accuracy on shapes against trained parameters"},
            prepare=write_clouds,
        ),
        Table("dense-segmentation", {"camvid": "camvid"}, "12 min", {}),
        Table("dense-detection", {"bccd": "det/bccd", "raccoon": "det/raccoon"}, "30 min", {}),
        Table("dense-instances", {"nuclei": "inst/nuclei", "coco128": "inst/coco128"}, "1 h", {}),
        Table("cascade", {"nuclei": "inst/nuclei", "coco128": "inst/coco128"}, "50 min", {}),
        Table("oriented", {"ships": "obb/dota_tiles"}, "30 min", {}, prepare=write_ships),
        Table("oriented-harbour", {"harbour": "obb/dota_tiles"}, "15 min", {}, prepare=write_harbour),
        Adapters(),
    )
}


def describe(table: Table | Adapters) -> str:
    """What --list says."""
    return f"{table.name}\n  needs {', '.join(table.needs)} below --data\n  takes {table.time} of one CPU core"
