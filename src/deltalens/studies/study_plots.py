"""Plots of a study as SVG files that stand alone, on a light background."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.figure import page_colours
from deltalens.studies.plots import COLOURS, Line, Point, lines, scatter
from deltalens.studies.results import count_text
from deltalens.studies.study import folder_name
from deltalens.studies.study_table import Cell, StudyTable

SIZE = (720, 440)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def write_plots(table: StudyTable, folder: str | os.PathLike, x_title: str) -> list[Path]:
    """For every backbone and dataset accuracy against trained parameters, and over x where there are curves. Plots
    without a finished run are left out. Returns the files."""
    written = []
    for backbone, dataset in dict.fromkeys((cell.backbone, cell.dataset) for cell in table.cells):
        cells = [c for c in table.cells if (c.backbone, c.dataset) == (backbone, dataset) and c.mean is not None]
        name = folder_name(f"{backbone}-{dataset}")
        drawn = {f"{name}-parameters.svg": parameters_plot(cells), f"{name}-curves.svg": curves_plot(cells, x_title)}
        for file, svg in drawn.items():
            if svg is not None:
                write_text(Path(folder) / file, standalone(svg, SIZE))
                written.append(Path(folder) / file)
    return written


def parameters_plot(cells: Sequence[Cell]) -> str | None:
    """Accuracy against trained parameters, head included."""
    points = [Point(c.variant.label, c.adapter_parameters + c.head_parameters, c.mean, c.std) for c in cells]
    if not points:
        return None
    return scatter(points, "trained parameters, head included", "test accuracy, %", count_text, SIZE, to_hundred=False)


def curves_plot(cells: Sequence[Cell], x_title: str) -> str | None:
    """Accuracy over x, a line for each curve with two points at least."""
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for cell in cells:
        if cell.variant.curve is not None:
            curves.setdefault(cell.variant.curve, []).append((cell.variant.x, cell.mean, cell.std))
    drawn = [
        Line(name, sorted(points, key=lambda point: point[0]), number)
        for number, (name, points) in enumerate(curves.items(), 1)
        if len(points) > 1
    ]
    return lines(drawn, x_title, "test accuracy, %", as_percent=True, size=SIZE) if drawn else None


def standalone(svg: str, size: tuple[int, int]) -> str:
    """An inline plot as a file of its own: with the page's light colours, which no page is there to give."""
    light = page_colours()
    rules = [
        f"svg{{background:{light['card']};font:13px {FONT}}}",
        f"text{{fill:{light['soft']}}}.tick{{font-size:12px}}.axis-title{{font-size:12.5px}}.name{{font-weight:600}}",
        ".line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}",
        f".grid{{stroke:{light['line']};fill:none}}.axis{{stroke:{light['soft']};fill:none}}",
        f".leader{{stroke:{light['soft']};opacity:.55;fill:none}}",
        *(
            f".line.c{i}{{stroke:{light[f'c{i}']}}}.dot.c{i},.name.c{i}{{fill:{light[f'c{i}']}}}"
            for i in range(COLOURS)
        ),
    ]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
    background = f'<rect width="100%" height="100%" fill="{light["card"]}"/>'
    head, _, rest = svg.partition(">")
    return f"{opening}{head.removeprefix('<svg ')}><style>{''.join(rules)}</style>{background}{rest}\n"
