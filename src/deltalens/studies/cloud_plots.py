"""Pictures of point clouds: one for a page, and a figure of many with what a model says about each."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from deltalens.data.cloud_transforms import unit_sphere
from deltalens.studies.figure import check_kind, page_colours, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AZIMUTH, ELEVATION = 35.0, 22.0  # degrees, of the eye: round the y axis, which points up, and above the ground
FAR, NEAR = "#c3d3ee", "#12306b"  # colours by depth
POINTS = 1024  # of a cloud that are drawn
COLUMNS, MOST = 5, 200
PANEL = (1.9, 2.25)  # inches
LONGEST_NAME = 26

Rows = Sequence[tuple[str, Sequence[tuple[str, float]]]]


def seen(cloud: Tensor, azimuth: float = AZIMUTH, elevation: float = ELEVATION) -> np.ndarray:
    """(points, 3): right, up, and towards the eye, of a cloud (n, 3) in the unit ball, without perspective; the far
    points come first. Of more than 1024 points every so many are taken."""
    step = -(-len(cloud) // POINTS)
    points = unit_sphere(cloud[::step].double()).numpy()
    a, e = math.radians(azimuth), math.radians(elevation)
    right = np.array([math.cos(a), 0, -math.sin(a)])
    eye = np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    places = points @ np.stack([right, np.cross(eye, right), eye], 1)
    return places[np.argsort(places[:, 2], kind="stable")]


def draw_cloud(axis: Axes, cloud: Tensor, size: float = 4.0) -> None:
    """Draw a cloud into an axis as seen from the front, the right and above; near points are dark and large. size: of
    the points, in square points of print."""
    from matplotlib.colors import LinearSegmentedColormap

    places = seen(cloud)
    depth = (places[:, 2] + 1) / 2
    colours = LinearSegmentedColormap.from_list("depth", [FAR, NEAR])(depth)
    axis.scatter(places[:, 0], places[:, 1], s=size * (0.5 + depth), c=colours, linewidths=0, rasterized=True)
    axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[])
    axis.set_aspect("equal")
    axis.spines[:].set_visible(False)


def cloud_picture(cloud: Tensor, pixels: int = 160) -> np.ndarray:
    """A cloud as a picture, uint8 (pixels, pixels, 3), on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 2), dpi=pixels / 2, facecolor="white")
    FigureCanvasAgg(figure)
    draw_cloud(figure.add_axes((0, 0, 1, 1)), cloud, 5.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def plot_predictions(clouds: Sequence[Tensor], rows: Rows, path: str | os.PathLike) -> None:
    """Write small pictures of clouds, each with its file's name and the classes that are said, with their
    probabilities, as SVG, PNG or PDF.

    rows: (file, [(class, probability), ...]) of each cloud. ValueError for more than 200 clouds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_kind(path)
    if not 1 <= len(clouds) <= MOST:
        raise ValueError(f"a figure holds 1 to {MOST} clouds, and these are {len(clouds)}: name fewer files")
    columns = min(COLUMNS, len(clouds))
    lines = -(-len(clouds) // columns)
    said = max(1, *(len(classes) for _, classes in rows))
    height = PANEL[1] + 0.16 * (said - 1)
    figure = Figure(figsize=(PANEL[0] * columns, height * lines), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    colours = page_colours()
    for number, axis in enumerate(figure.subplots(lines, columns, squeeze=False).ravel()):
        if number >= len(clouds):
            axis.set_axis_off()
            continue
        draw_cloud(axis, clouds[number])
        axis.set_facecolor(colours["card"])
        file, classes = rows[number]
        _say(axis, file, classes, colours)
    save_figure(figure, path)


def _say(axis: Any, file: str, classes: Sequence[tuple[str, float]], colours: dict[str, str]) -> None:
    """The classes above a cloud, its file below."""
    said = [f"{textwrap.shorten(name, 20, placeholder='…')}  {100 * share:.0f} %" for name, share in classes]
    title = axis.set_title("\n".join(said) or "none", fontsize=9.5, color=colours["ink"], loc="left")
    title.set_parse_math(False)
    half = (LONGEST_NAME - 1) // 2
    name = "/".join(file.replace(os.sep, "/").rsplit("/", 2)[-2:])
    name = name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"
    label = axis.set_xlabel(name, fontsize=7.5, color=colours["soft"], loc="left")
    label.set_parse_math(False)
