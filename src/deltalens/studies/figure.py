"""Figures by matplotlib in the look of the report, saved as SVG, PNG or PDF."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltalens.lifecycle.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".svg", ".png", ".pdf")


def page_colours() -> dict[str, str]:
    """The light colours of the report's page: "ink", "soft", "line", "card", and "c0" to "c7" of the methods."""
    page = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w+);", page.partition("@media")[0]))


def new_figure(rows: int, columns: int, panel: tuple[float, float] = (4.2, 3.2)) -> tuple[Figure, list[Any]]:
    """(figure, its axes row by row), each panel of that size in inches; nothing is shown on a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = page_colours()
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(colours["soft"])
        each.tick_params(colors=colours["soft"], labelsize=9)
        each.title.set_color(colours["ink"])
        each.title.set_fontsize(10.5)
        for label in (each.xaxis.label, each.yaxis.label):
            label.set_color(colours["soft"])
            label.set_fontsize(9.5)
    return figure, axes


def check_kind(path: str | os.PathLike) -> None:
    """ValueError for a file that no figure can be saved as."""
    if Path(path).suffix.lower() not in KINDS:
        raise ValueError(f"a figure is saved as {', '.join(KINDS)}, and {path} is none of these")


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure; the ending of the path gives the kind. The same figure gives the same file."""
    import matplotlib

    check_kind(path)
    kind = Path(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "deltalens"}):
        figure.savefig(temporary, format=kind, metadata=undated)
