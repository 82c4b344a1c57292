"""What a search has found, as one picture: for each query its images, best first, with their cosines."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

from deltalens.data.image_folder import read_image
from deltalens.studies.figure import check_kind, page_colours, save_figure
from deltalens.studies.text_search import Found

LEAST_COLUMNS, MOST_COLUMNS, MOST = 3, 5, 500
PANEL, HEADING, MARGIN = (1.9, 2.2), 0.4, 0.042  # inches
LETTERS = 20  # of a query above each column
LONGEST = 300  # pixels of a picture's longer side
LONGEST_NAME = 26


def plot_found(queries: Sequence[str], found: Sequence[Sequence[Found]], path: str | os.PathLike) -> None:
    """Write the sheet as SVG, PNG or PDF, by the ending of the path. ValueError for more than 500 pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_kind(path)
    if sum(map(len, found)) > MOST:
        raise ValueError(f"a sheet holds {MOST} pictures at most, and these are {sum(map(len, found))}: lower --topk")
    columns = min(MOST_COLUMNS, max(LEAST_COLUMNS, *map(len, found)))
    rows = [-(-len(each) // columns) for each in found]
    heights = [HEADING + PANEL[1] * count for count in rows]
    colours = page_colours()
    width = PANEL[0] * columns
    figure = Figure(figsize=(width, sum(heights)), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, query, images, count in zip(parts, queries, found, rows, strict=True):
        shown = textwrap.shorten(query, LETTERS * columns, placeholder=" …")
        heading = part.suptitle(shown, x=MARGIN / width, ha="left", fontsize=12, color=colours["ink"])
        heading.set_parse_math(False)
        for number, axis in enumerate(part.subplots(count, columns, squeeze=False).ravel()):
            if number < len(images):
                _draw(axis, number + 1, images[number], colours)
            else:
                axis.set_axis_off()
    save_figure(figure, path)


def _draw(axis: Any, rank: int, found: Found, colours: dict[str, str]) -> None:
    picture = read_image(found.image)
    picture.thumbnail((LONGEST, LONGEST))
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.set_box_aspect(1)
    axis.set_anchor("N")
    axis.set_facecolor(colours["track"])
    axis.spines[:].set_visible(False)
    axis.set_title(f"{rank}   {found.cosine:.3f}", fontsize=9.5, color=colours["ink"], loc="left")
    name = axis.set_xlabel(_short(found.image.name), fontsize=7.5, color=colours["soft"], loc="left")
    name.set_parse_math(False)


def _short(name: str) -> str:
    """A long name without its middle, where numbers at the end tell files apart."""
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"
