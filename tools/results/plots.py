"""The plots of a table, as files that stand alone."""

from __future__ import annotations

from collections.abc import Callable

from deltalens.studies.cells import Cell
from deltalens.studies.plots import HEIGHT, WIDTH
from deltalens.studies.study import Study, folder_name
from deltalens.studies.study_panels import image_panels, panel_plot
from deltalens.studies.study_plots import SIZE, curves_plot, halves_plots, method_numbers, parameters_plot, standalone
from deltalens.studies.study_report_plots import task_figures
from deltalens.studies.study_table import StudyTable


def draw(kind: str, table: StudyTable, study: Study) -> dict[str, str]:
    """Name -> SVG of all plots of a kind that have something to show."""
    return {name: svg for name, svg in KINDS[kind](table, study).items() if svg is not None}


def _parameters(table: StudyTable, study: Study) -> dict[str, str | None]:
    """Accuracy against trained parameters, for every task."""
    numbers = method_numbers(table.cells)
    return _for_tasks(table, lambda cells: parameters_plot(cells, numbers))


def _curves(table: StudyTable, study: Study) -> dict[str, str | None]:
    """Accuracy over x, for every task."""
    numbers = method_numbers(table.cells)
    return _for_tasks(table, lambda cells: curves_plot(cells, study.x_title, numbers))


def _for_tasks(table: StudyTable, plot: Callable[[list[Cell]], str | None]) -> dict[str, str | None]:
    drawn: dict[str, str | None] = {}
    for task in dict.fromkeys((cell.backbone, cell.dataset) for cell in table.cells):
        svg = plot([c for c in table.cells if (c.backbone, c.dataset) == task and c.mean is not None])
        drawn[folder_name("-".join(task))] = standalone(svg, SIZE) if svg else None
    return drawn


def _tasks(table: StudyTable, study: Study) -> dict[str, str | None]:
    """One task against the other, for every backbone."""
    pair = study.scatter_datasets
    figures = task_figures(table.cells, pair, method_numbers(table.cells)) if pair else []
    return {folder_name(name): standalone(svg, (WIDTH, HEIGHT)) for name, svg in figures}


def _images(table: StudyTable, study: Study) -> dict[str, str | None]:
    """Accuracy over training images, for every backbone and dataset with several parts."""
    numbers = method_numbers(table.cells)
    drawn = {panel.name: panel_plot(panel, numbers, SIZE) for panel in image_panels(table)}
    return {name: standalone(svg, SIZE) if svg else None for name, svg in drawn.items()}


def _halves(table: StudyTable, study: Study) -> dict[str, str | None]:
    """Novel against base classes, for every backbone."""
    drawn = halves_plots(table, method_numbers(table.cells))
    return {folder_name(backbone): standalone(svg, (WIDTH, HEIGHT)) for backbone, svg in drawn.items()}


KINDS = {"halves": _halves, "parameters": _parameters, "curves": _curves, "tasks": _tasks, "images": _images}
