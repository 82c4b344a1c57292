"""The VTAB-1k part of a study's table: a row for each method that has finished every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deltalens.data.vtab1k import GROUPS, TASKS
from deltalens.studies.markdown import markdown_table
from deltalens.studies.published import MEAN, Published
from deltalens.studies.published_table import published_rows
from deltalens.studies.vtab import total_parameters, vtab_summary

if TYPE_CHECKING:
    from deltalens.studies.cells import Cell


def vtab_parts(cells: Sequence[Cell], tasks: Mapping[str, str], published: Sequence[Published] = ()) -> list[str]:
    """A table and a note in Markdown. cells: of one backbone; tasks: dataset -> task."""
    header, body, note = vtab_rows(cells, tasks)
    return [markdown_table(header, [*body, *published_vtab_rows(cells[0].backbone, tasks, published)]), note]


def published_vtab_rows(backbone: str, tasks: Mapping[str, str], published: Sequence[Published]) -> list[list[str]]:
    """Rows of published group means, of groups whose tasks are all here."""
    groups = [group for group in GROUPS if any(TASKS[task].group == group for task in tasks.values())]
    whole = {group: {t for t in TASKS if TASKS[t].group == group} <= set(tasks.values()) for group in groups}
    columns = [None, *((backbone, group) if whole[group] else None for group in groups), (backbone, MEAN), None]
    return [[label, *line] for label, line in published_rows(published, columns)]


def vtab_rows(cells: Sequence[Cell], tasks: Mapping[str, str]) -> tuple[list[str], list[list[str]], str]:
    """Header, a row for each method, and a note."""
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.variant.label, []).append(cell)
    groups = [group for group in GROUPS if any(TASKS[task].group == group for task in tasks.values())]
    sizes = {group: sum(TASKS[task].group == group for task in tasks.values()) for group in groups}
    full = next((_accuracies(each, tasks) for each in by_label.values() if each[0].variant.is_full), None)
    header = ["method", "total params", *(f"{group} ({sizes[group]})" for group in groups)]
    header += [f"mean of {len(tasks)}", f"mean of {len(groups)} groups"]
    body = [_row(label, each, tasks, groups, full) for label, each in by_label.items()]
    note = "Total params: backbone, adapters and heads of all tasks, in backbones."
    note += " In brackets: tasks with more than full fine-tuning." if full else ""
    if len(tasks) < len(TASKS):
        note += f" Only {len(tasks)} of the {len(TASKS)} tasks are in this study."
    return header, body, note


def _row(
    label: str,
    cells: Sequence[Cell],
    tasks: Mapping[str, str],
    groups: Sequence[str],
    full: Mapping[str, float] | None,
) -> list[str]:
    accuracies = _accuracies(cells, tasks)
    if accuracies is None:
        return [label, *["-"] * (len(groups) + 3)]
    summary = vtab_summary(accuracies, None if cells[0].variant.is_full else full)
    wins = {group: f" ({summary.wins[group]})" if summary.wins else "" for group in groups}
    total = total_parameters(
        cells[0].backbone_parameters,
        [cell.adapter_parameters for cell in cells],
        [cell.head_parameters for cell in cells],
    )
    return [
        label,
        f"{total:.2f}x",
        *(f"{summary.groups[group]:.2f}{wins[group]}" for group in groups),
        f"{summary.mean:.2f}",
        f"{summary.mean_of_groups:.2f}",
    ]


def _accuracies(cells: Sequence[Cell], tasks: Mapping[str, str]) -> dict[str, float] | None:
    """Task -> accuracy in per cent, None where a run is missing or failed."""
    if any(cell.mean is None or cell.left or cell.failures_of_finals for cell in cells):
        return None
    return {tasks[cell.dataset]: 100 * cell.mean for cell in cells}
