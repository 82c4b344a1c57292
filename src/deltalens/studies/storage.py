"""What it takes to store several tasks: one backbone and an adapter for each, against a whole model for each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltalens.studies.markdown import markdown_table
from deltalens.studies.results import bytes_text, percent_text
from deltalens.studies.vtab import total_parameters

if TYPE_CHECKING:
    from deltalens.studies.cells import Cell

COUNTS = (1, 10, 100)  # tasks that totals are computed for


@dataclass(frozen=True)
class StoredAdapter:
    """One task of one method. adapter_bytes: on disk, with the head. backbone_bytes, model_bytes: of the plain backbone
    without and with a head, as safetensors files; None where they are not known."""

    method: str
    backbone: str
    task: str
    adapter_bytes: float
    backbone_bytes: int | None
    model_bytes: int | None
    adapter_parameters: int
    head_parameters: int
    backbone_parameters: int | None

    @property
    def whole(self) -> bool:
        """Whether the adapter holds the whole backbone, so that no other copy is needed: full fine-tuning."""
        return self.backbone_parameters is not None and self.adapter_parameters >= self.backbone_parameters


@dataclass(frozen=True)
class StorageRow:
    """All tasks of one method. adapter_bytes: the mean, with the head. total: of all tasks, measured: the backbone once
    and every adapter; of full fine-tuning every adapter alone. models: a whole tuned model for each task. parameters:
    the same count as total, in backbones (see `total_parameters`)."""

    method: str
    tasks: int
    adapter_bytes: float
    backbone_bytes: int | None
    total: float | None
    models: float | None
    parameters: float | None
    whole: bool

    def total_for(self, tasks: int) -> float | None:
        """Bytes of so many tasks with adapters of the mean size: computed."""
        if self.backbone_bytes is None:
            return None
        return (0 if self.whole else self.backbone_bytes) + tasks * self.adapter_bytes

    @property
    def percent(self) -> float | None:
        """100 * total / whole models."""
        return None if self.total is None or self.models is None else 100 * self.total / self.models


def storage_rows(adapters: Sequence[StoredAdapter]) -> list[StorageRow]:
    """A row for each method of one backbone. A whole model of a task has the smallest head that its adapters have."""
    models: dict[str, int | None] = {}
    for each in adapters:
        known = [size for size in (models.get(each.task), each.model_bytes) if size is not None]
        models[each.task] = min(known, default=None)
    rows = []
    for method in dict.fromkeys(each.method for each in adapters):
        own = [each for each in adapters if each.method == method]
        backbone = next((each.backbone_bytes for each in own if each.backbone_bytes is not None), None)
        sizes, whole = [models[each.task] for each in own], all(each.whole for each in own)
        rows.append(
            StorageRow(
                method=method,
                tasks=len(own),
                adapter_bytes=statistics.fmean(each.adapter_bytes for each in own),
                backbone_bytes=backbone,
                total=None if backbone is None else (0 if whole else backbone) + sum(e.adapter_bytes for e in own),
                models=None if None in sizes else sum(size for size in sizes if size is not None),
                parameters=_parameters(own),
                whole=whole,
            )
        )
    return rows


def _parameters(own: Sequence[StoredAdapter]) -> float | None:
    backbone = own[0].backbone_parameters
    if backbone is None:
        return None
    return total_parameters(backbone, [e.adapter_parameters for e in own], [e.head_parameters for e in own])


# ------------------------------------------------------------------ of a study
def study_storage(cells: Sequence[Cell], sources: Mapping[str, str]) -> dict[str, list[StorageRow]]:
    """Backbone -> a row for each method that has results on every dataset. A dataset that is used in several amounts is
    one task, with its largest."""
    tasks = largest_parts(sources)
    found: dict[str, list[StorageRow]] = {}
    for backbone in dict.fromkeys(cell.backbone for cell in cells):
        own = [cell for cell in cells if cell.backbone == backbone and cell.dataset in tasks]
        lacking = {cell.variant.label for cell in own if None in (cell.adapter_bytes, cell.backbone_bytes)}
        rows = storage_rows([_of_cell(cell) for cell in own if cell.variant.label not in lacking])
        if rows:
            found[backbone] = rows
    return found


def largest_parts(sources: Mapping[str, str]) -> set[str]:
    """The datasets without those that are a smaller part of another. sources: dataset -> the one it is a part of, parts
    from the smallest."""
    return set({source: dataset for dataset, source in sources.items()}.values())


def _of_cell(cell: Cell) -> StoredAdapter:
    return StoredAdapter(
        cell.variant.label,
        cell.backbone,
        cell.dataset,
        cell.adapter_bytes or 0,
        cell.backbone_bytes,
        cell.model_bytes,
        cell.adapter_parameters or 0,
        cell.head_parameters or 0,
        cell.backbone_parameters,
    )


# ------------------------------------------------------------------ texts
def storage_table(rows: Sequence[StorageRow], with_parameters: bool = True) -> tuple[list[str], list[list[str]], str]:
    """Header, a line for each row, and a note. Backbone "none": the adapters hold it. with_parameters: the column of
    VPT's and Mona's papers, too."""
    counts = {row.tasks for row in rows}
    number = str(counts.pop()) if len(counts) == 1 else "all"
    header = ["method", "backbone", "mean adapter", f"total, {number} tasks", f"% of {number} models"]
    header = [text.replace("1 tasks", "1 task").replace("% of 1 models", "% of 1 model") for text in header]
    header += ["total params"] if with_parameters else []
    header += [f"{count} task{'s' if count > 1 else ''} *" for count in COUNTS]
    body = []
    for row in rows:
        several = f" ({row.tasks})" if number == "all" else ""
        line = [row.method, "none" if row.whole else _bytes(row.backbone_bytes), _bytes(row.adapter_bytes)]
        line += [_bytes(row.total) + several, "-" if row.percent is None else percent_text(row.percent)]
        line += ["-" if row.parameters is None else f"{row.parameters:.2f}x"] if with_parameters else []
        body.append(line + [_bytes(row.total_for(count)) for count in COUNTS])
    note = (
        "Measured: bytes on disk of the backbone, stored once, and of an adapter with its head for each task; in per "
    )
    note += "cent of a whole tuned model for each task. Full fine-tuning needs no other backbone. "
    note += "Total params: parameters of all tasks together, in backbones. " if with_parameters else ""
    return header, body, note + "* computed: with so many adapters of the mean size."


def storage_parts(cells: Sequence[Cell], sources: Mapping[str, str], vtab: bool) -> list[str]:
    """Markdown: a heading, a table and a note for each backbone. vtab: total parameters are said elsewhere."""
    parts = []
    for backbone, rows in study_storage(cells, sources).items():
        header, body, note = storage_table(rows, not vtab)
        parts += [f"## Storage, {backbone}", markdown_table(header, body), note.replace("*", "\\*")]
    return parts


def _bytes(count: float | None) -> str:
    return "-" if count is None else bytes_text(count)
