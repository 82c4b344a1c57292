"""The plots of a study's report: (title, SVG) pairs that take their colours from the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from deltalens.studies.cells import Cell
from deltalens.studies.labels import short_name
from deltalens.studies.main_metrics import metric_words
from deltalens.studies.plots import HEIGHT, WIDTH, Curve, Point, curves, scatter
from deltalens.studies.plots_compare import RankRow, TwoTasks, rank_plot, task_scatter
from deltalens.studies.results import count_text
from deltalens.studies.significance import Ranking, tasks_of
from deltalens.studies.study_details import Details
from deltalens.studies.study_panels import Panel, panel_plot
from deltalens.studies.study_plots import parameters_plot
from deltalens.studies.study_table import StudyTable, accuracy_title

MOST_TASKS = 12  # with more, only the means over datasets are shown; plots/ has every task
Numbers = Mapping[str, int]
Figure = tuple[str, str]


def parameter_figures(cells: Sequence[Cell], numbers: Numbers) -> list[Figure]:
    """Accuracy against trained parameters: for every backbone the mean over its datasets, then every task."""
    tasks = tasks_of(cells)
    figures = []
    for backbone in dict.fromkeys(backbone for backbone, _ in tasks):
        own = [cell for cell in cells if cell.backbone == backbone]
        datasets = list(dict.fromkeys(cell.dataset for cell in own))
        mean = _mean_plot(own, numbers) if len(datasets) > 1 else None
        figures += [(f"{backbone}, mean over {len(datasets)} datasets", mean)] if mean else []
    for task in tasks if len(tasks) <= MOST_TASKS else ():
        svg = parameters_plot([c for c in cells if (c.backbone, c.dataset) == task], numbers, (WIDTH, HEIGHT))
        figures += [(", ".join(task), svg)] if svg else []
    return figures


def _mean_plot(cells: Sequence[Cell], numbers: Numbers) -> str | None:
    """Methods that have a result on every dataset; parameters are the mean over datasets, whose heads differ."""
    points = []
    for label in dict.fromkeys(cell.variant.label for cell in cells):
        own = [cell for cell in cells if cell.variant.label == label]
        if all(cell.mean is not None for cell in own):
            size = max(1.0, statistics.fmean(cell.with_head for cell in own))
            points.append(
                Point(short_name(label), size, statistics.fmean(cell.mean for cell in own), None, numbers[label])
            )
    if not points:
        return None
    title = accuracy_title(cells)
    return scatter(points, "trained parameters, head included", title, count_text, to_hundred=False)


def panel_figures(panels: Sequence[Panel], numbers: Numbers) -> list[Figure]:
    """A curve for each method in every panel; none where there are too many panels."""
    drawn = [(panel.title, panel_plot(panel, numbers)) for panel in panels] if len(panels) <= MOST_TASKS else []
    return [(title, svg) for title, svg in drawn if svg is not None]


def task_figures(cells: Sequence[Cell], pair: tuple[str, str], numbers: Numbers) -> list[Figure]:
    """For every backbone, one task against the other; full fine-tuning as dashed lines."""
    found = {(cell.backbone, cell.dataset, cell.variant.label): cell for cell in cells}
    figures = []
    for backbone in dict.fromkeys(cell.backbone for cell in cells):
        points = []
        for label in numbers:
            x, y = (found[backbone, dataset, label] for dataset in pair)
            if x.mean is not None and y.mean is not None:
                points.append(
                    TwoTasks(short_name(label), x.mean, y.mean, x.std, y.std, numbers[label], x.variant.is_full)
                )
        if points:
            x_title, y_title = (
                f"{dataset}: {accuracy_title([c for c in cells if (c.backbone, c.dataset) == (backbone, dataset)])}"
                for dataset in pair
            )
            figures.append((backbone, task_scatter(points, x_title, y_title)))
    return figures


def rank_figure(ranking: Ranking, numbers: Numbers) -> str:
    """Mean ranks, best first."""
    rows = [RankRow(short_name(row.label), row.mean, row.std, row.ranks, numbers[row.label]) for row in ranking.rows]
    return rank_plot(rows, ranking.distance)


def curve_figures(table: StudyTable, details: Details, numbers: Numbers) -> list[Figure]:
    """Validation accuracy by epoch for every task where final runs have validation images; with many tasks the mean
    over the datasets of each backbone."""
    tasks = tasks_of(table.cells)
    figures = []
    for task in tasks if len(tasks) <= MOST_TASKS else ():
        series = [
            mean_curve(label, details.curves[(*task, label)], number)
            for label, number in numbers.items()
            if (*task, label) in details.curves
        ]
        figures += _curve_figure(", ".join(task), series, [c for c in table.cells if (c.backbone, c.dataset) == task])
    for backbone in dict.fromkeys(backbone for backbone, _ in tasks) if len(tasks) > MOST_TASKS else ():
        own = [task for task in tasks if task[0] == backbone]
        series = []
        for label, number in numbers.items():
            runs = [details.curves.get((*task, label)) for task in own]
            if all(runs):
                means = [mean_curve(label, each, number).values for each in runs]
                series.append(mean_curve(label, [[statistics.fmean(v) for v in zip(*means, strict=False)]], number))
        cells = [cell for cell in table.cells if cell.backbone == backbone]
        figures += _curve_figure(f"{backbone}, mean over {len(own)} datasets", series, cells)
    return figures


def _curve_figure(title: str, series: Sequence[Curve], cells: Sequence[Cell]) -> list[Figure]:
    if not series:
        return []
    metric = metric_words(cell.metric for cell in cells)
    return [(title, curves(series, f"validation {metric}, %", as_percent=True, to_hundred=False))]


def mean_curve(label: str, runs: Sequence[Sequence[float]], number: int) -> Curve:
    """The mean over runs, with one sample standard deviation where there are two runs at least. Epochs that not all
    runs have are left out."""
    by_epoch = list(zip(*runs, strict=False))
    band = [statistics.stdev(values) for values in by_epoch] if len(runs) > 1 else None
    return Curve(short_name(label), [statistics.fmean(values) for values in by_epoch], number, band)
