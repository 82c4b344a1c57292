"""Plots of a study as SVG files that stand alone, on a light background."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.cells import Cell
from deltalens.studies.figure import page_colours
from deltalens.studies.labels import short_name
from deltalens.studies.plots import COLOURS, HEIGHT, WIDTH, Line, Point, lines, scatter
from deltalens.studies.plots_compare import TwoTasks, task_scatter
from deltalens.studies.plots_storage import storage_plot
from deltalens.studies.results import count_text
from deltalens.studies.storage import study_storage
from deltalens.studies.study import folder_name
from deltalens.studies.study_panels import image_panels, panel_plot, size_panels
from deltalens.studies.study_table import StudyTable, accuracy_title
from deltalens.studies.transfer_table import halves

SIZE = (720, 440)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def write_plots(table: StudyTable, folder: str | os.PathLike, x_title: str) -> list[Path]:
    """For every backbone and dataset accuracy against trained parameters, and over x where there are curves; accuracy
    over training images and over the backbone's size where a study varies them; bytes on disk. Plots without a finished
    run are left out. Returns the files."""
    written, numbers = [], method_numbers(table.cells)
    for backbone, dataset in dict.fromkeys((cell.backbone, cell.dataset) for cell in table.cells):
        cells = [c for c in table.cells if (c.backbone, c.dataset) == (backbone, dataset) and c.mean is not None]
        name = folder_name(f"{backbone}-{dataset}")
        drawn = {
            f"{name}-parameters": parameters_plot(cells, numbers),
            f"{name}-curves": curves_plot(cells, x_title, numbers),
        }
        written += [_write(folder, file, svg, SIZE) for file, svg in drawn.items() if svg is not None]
    for panel in [*image_panels(table), *size_panels(table)]:
        svg = panel_plot(panel, numbers, SIZE)
        written += [_write(folder, panel.name, svg, SIZE)] if svg is not None else []
    for backbone, svg in halves_plots(table, numbers).items():
        written.append(_write(folder, f"{folder_name(backbone)}-base-to-novel", svg, (WIDTH, HEIGHT)))
    for backbone, rows in study_storage(table.cells, table.sources).items():
        svg, size = storage_plot(rows, numbers)
        written.append(_write(folder, f"{folder_name(backbone)}-storage", svg, size))
    return written


def _write(folder: str | os.PathLike, name: str, svg: str, size: tuple[int, int]) -> Path:
    file = Path(folder) / f"{name}.svg"
    write_text(file, standalone(svg, size))
    return file


def method_numbers(cells: Sequence[Cell]) -> dict[str, int]:
    """Label -> the number that gives its colour: its place in the study, the same in every plot."""
    return {label: number for number, label in enumerate(dict.fromkeys(cell.variant.label for cell in cells))}


def parameters_plot(cells: Sequence[Cell], numbers: Mapping[str, int], size: tuple[int, int] = SIZE) -> str | None:
    """Accuracy against trained parameters, head included."""
    points = [
        Point(short_name(c.variant.label), max(1, c.with_head), c.mean, c.std, numbers[c.variant.label])
        for c in cells
        if c.mean is not None
    ]
    if not points:
        return None
    title = accuracy_title(cells)
    return scatter(points, "trained parameters, head included", title, count_text, size, to_hundred=False)


def halves_plots(table: StudyTable, numbers: Mapping[str, int]) -> dict[str, str]:
    """Backbone -> novel against base classes, a point for each method that has both; dashed: the reference row."""
    drawn = {}
    for backbone, found in halves(table).items():
        points = [
            TwoTasks(
                short_name(label),
                base.value,
                novel.value,
                base.spread,
                novel.spread,
                numbers[label],
                label == table.reference,
            )
            for label, (base, novel, _) in found.body.items()
            if base.value is not None and novel.value is not None
        ]
        if points:
            drawn[backbone] = task_scatter(points, "base classes: test accuracy, %", "novel classes: test accuracy, %")
    return drawn


def curves_plot(cells: Sequence[Cell], x_title: str, numbers: Mapping[str, int]) -> str | None:
    """Accuracy over x, a line for each curve with two points at least, in the colour of its first method."""
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    first: dict[str, int] = {}
    for cell in cells:
        if cell.variant.curve is not None:
            first.setdefault(cell.variant.curve, numbers[cell.variant.label])
            curves.setdefault(cell.variant.curve, []).append((cell.variant.x, cell.mean, cell.std))
    drawn = [
        Line(short_name(name), sorted(points, key=lambda point: point[0]), first[name])
        for name, points in curves.items()
        if len(points) > 1
    ]
    return lines(drawn, x_title, accuracy_title(cells), as_percent=True, size=SIZE) if drawn else None


def standalone(svg: str, size: tuple[int, int]) -> str:
    """An inline plot as a file of its own: with the page's light colours, which no page is there to give."""
    light = page_colours()
    rules = [
        f"svg{{background:{light['card']};font:13px {FONT}}}",
        f"text{{fill:{light['soft']}}}.tick{{font-size:12px}}.axis-title{{font-size:12.5px}}.name{{font-weight:600}}",
        ".line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}",
        f".grid{{stroke:{light['line']};fill:none}}.axis{{stroke:{light['soft']};fill:none}}",
        f".leader{{stroke:{light['soft']};opacity:.55;fill:none}}",
        f".dot{{stroke:{light['card']};stroke-width:1}}",
        ".band{opacity:.14}.reference{fill:none;stroke-width:1.2;stroke-dasharray:5 4}.each{fill:none;opacity:.45}",
        *(
            f".line.c{i},.reference.c{i},.each.c{i}{{stroke:{light[f'c{i}']}}}.dot.c{i},.name.c{i},.band.c{i}{{fill:{light[f'c{i}']}}}"
            for i in range(COLOURS)
        ),
    ]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
    background = f'<rect width="100%" height="100%" fill="{light["card"]}"/>'
    head, _, rest = svg.partition(">")
    return f"{opening}{head.removeprefix('<svg ')}><style>{''.join(rules)}</style>{background}{rest}\n"
