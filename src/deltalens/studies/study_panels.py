"""Curves of a study over the number of training images, and over the size of the backbone: a line for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deltalens.studies.cells import Cell
from deltalens.studies.labels import short_name
from deltalens.studies.plots import HEIGHT, WIDTH, Line, lines
from deltalens.studies.results import count_text
from deltalens.studies.storage import largest_parts
from deltalens.studies.study import folder_name
from deltalens.studies.study_table import StudyTable, accuracy_title


@dataclass(frozen=True)
class Panel:
    """A plot. title: of the report's figure. name: of the file. x: of a cell, None for one without a result. x_text:
    how it is written."""

    title: str
    name: str
    x_title: str
    x: Callable[[Cell], int | None]
    x_text: Callable[[float], str]
    cells: Sequence[Cell]


def image_panels(table: StudyTable) -> list[Panel]:
    """For every backbone and every dataset that the study uses in several amounts: accuracy over training images."""
    found = []
    for backbone in dict.fromkeys(cell.backbone for cell in table.cells):
        for source in dict.fromkeys(table.sources.values()):
            parts = [name for name, whole in table.sources.items() if whole == source]
            cells = [cell for cell in table.cells if cell.backbone == backbone and cell.dataset in parts]
            if len(parts) > 1:
                name = f"{folder_name(f'{backbone}-{source}')}-training-images"
                found.append(
                    Panel(f"{backbone}, {source}", name, "training images", lambda c: c.training_images, _whole, cells)
                )
    return found


def size_panels(table: StudyTable) -> list[Panel]:
    """For every dataset of a study with several backbones: accuracy over the backbone's parameters, without a head. A
    dataset in several amounts counts with its largest."""
    found, largest = [], largest_parts(table.sources)
    for dataset in dict.fromkeys(cell.dataset for cell in table.cells if cell.dataset in largest):
        cells = [cell for cell in table.cells if cell.dataset == dataset]
        sizes = {cell.backbone: cell.backbone_parameters for cell in cells if cell.backbone_parameters}
        if len(set(sizes.values())) > 1:
            named = ", ".join(f"{name} {count_text(size)}" for name, size in sorted(sizes.items(), key=lambda e: e[1]))
            title, name = f"{dataset}: {named}", f"{folder_name(dataset)}-backbones"
            found.append(
                Panel(title, name, "parameters of the backbone", lambda c: c.backbone_parameters, count_text, cells)
            )
    return found


def panel_plot(panel: Panel, numbers: Mapping[str, int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str | None:
    """Mean over seeds, with one standard deviation as a bar; a logarithmic x axis. None where no method has results at
    two places."""
    series = []
    for label in dict.fromkeys(cell.variant.label for cell in panel.cells):
        own = [cell for cell in panel.cells if cell.variant.label == label and cell.mean is not None]
        points = [(x, cell.mean, cell.std) for cell in own if (x := panel.x(cell)) is not None]
        if points:
            points.sort(key=lambda point: point[0])
            series.append(Line(short_name(label), points, numbers[label]))
    if not any(len({x for x, _, _ in line.points}) > 1 for line in series):
        return None
    title = accuracy_title(panel.cells)
    return lines(series, panel.x_title, title, True, size, logarithmic=True, x_text=panel.x_text)


def _whole(count: float) -> str:
    return f"{count:,.0f}"
