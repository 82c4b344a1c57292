"""What the runs of a study found: a row per method as Markdown, and a row per run as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from deltalens.data.vtab1k import task_of
from deltalens.studies.candidates import values_text
from deltalens.studies.cells import Cell, RunRow
from deltalens.studies.grid import Grid
from deltalens.studies.main_metrics import TOP1, metric_of, metric_words, score
from deltalens.studies.markdown import markdown_table
from deltalens.studies.protocol import protocol_text
from deltalens.studies.published import NOVEL, Published, without_halves
from deltalens.studies.published_table import (
    only_published,
    overview_columns,
    published_columns,
    published_note,
    published_rows,
    published_runs,
)
from deltalens.studies.results import percent_text, seconds_text
from deltalens.studies.storage import storage_parts
from deltalens.studies.study import Study
from deltalens.studies.transfer_table import transfer_tables
from deltalens.studies.trial import Run
from deltalens.studies.vtab_table import vtab_parts


@dataclass(frozen=True)
class StudyTable:
    """All that is there of a study at the moment."""

    title: str
    rows: list[RunRow]
    cells: list[Cell]
    description: str
    vtab_tasks: dict[str, str] = field(default_factory=dict)  # dataset -> task, where all datasets are VTAB-1k's
    sources: dict[str, str] = field(default_factory=dict)  # dataset -> the one it is a part of, or itself
    published: tuple[Published, ...] = ()
    base_to_novel: bool = False
    targets: tuple[str, ...] = ()
    reference: str | None = None  # the row that others are compared with

    @property
    def published_here(self) -> tuple[Published, ...]:
        """What stands beside what is measured on the runs' own data."""
        return without_halves(self.published) if self.base_to_novel else self.published

    # ------------------------------------------------------------------ texts
    def to_csv(self) -> str:
        text = io.StringIO()
        elsewhere = ([NOVEL] if self.base_to_novel else []) + list(self.targets)
        names = [each.name for each in fields(RunRow) if each.name != "transfer"] + [f"on {n}" for n in elsewhere]
        names += ["published"] if self.published else []
        writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in self.rows:
            there = {f"on {name}": row.transfer.get(name, {}).get("accuracy") for name in elsewhere}
            writer.writerow(vars(row) | there)
        writer.writerows(published_runs(self.published))
        return text.getvalue()

    def to_markdown(self) -> str:
        """An overview over all backbones and datasets, where there are several, then one table for each."""
        pairs = list(dict.fromkeys((cell.backbone, cell.dataset) for cell in self.cells))
        parts = [f"# {self.title}", self.description]
        parts += [part for each in transfer_tables(self) for part in each.to_markdown()]
        published = self.published_here
        if len(pairs) > 1:
            header, body = overview(self.cells)
            lines = [[label, *(text for text, _ in line)] for label, line in body.items()]
            lines += [[label, *line] for label, line in published_rows(published, overview_columns(pairs))]
            parts += [
                f"## {_heading(self.cells)}",
                markdown_table(["method", *header], lines),
            ]
        for backbone in dict.fromkeys(backbone for backbone, _ in pairs) if self.vtab_tasks else ():
            cells = [cell for cell in self.cells if cell.backbone == backbone]
            parts += [f"## VTAB-1k, {backbone}", *vtab_parts(cells, self.vtab_tasks, self.published)]
        for backbone, dataset in pairs:
            cells = [cell for cell in self.cells if (cell.backbone, cell.dataset) == (backbone, dataset)]
            parts += [f"## {backbone}, {dataset}", _pair_table(cells, published), *_notes(cells)]
        parts += storage_parts(self.cells, self.sources, bool(self.vtab_tasks))
        return "\n\n".join(parts) + "\n"


def overview(cells: Sequence[Cell]) -> tuple[list[str], dict[str, list[tuple[str, float | None]]]]:
    """(names of the columns, label -> (text, accuracy) of each): a column for every task, and their mean, which is left
    open where a task is not finished."""
    found = {(cell.variant.label, cell.backbone, cell.dataset): cell for cell in cells}
    pairs = list(dict.fromkeys((cell.backbone, cell.dataset) for cell in cells))
    one_backbone = len({backbone for backbone, _ in pairs}) == 1
    header = [*(dataset if one_backbone else f"{backbone}, {dataset}" for backbone, dataset in pairs), "mean"]
    body: dict[str, list[tuple[str, float | None]]] = {}
    for label in dict.fromkeys(cell.variant.label for cell in cells):
        row = [found[label, *pair] for pair in pairs]
        average = overall(row)
        mean = ("-" if average is None else f"{100 * average:.1f}", average)
        body[label] = [*((cell.accuracy_text(), cell.mean) for cell in row), mean]
    return header, body


def overall(row: Sequence[Cell]) -> float | None:
    """The mean over the tasks of one method; None where one has no result yet, or not all of its runs."""
    if any(cell.mean is None or cell.left for cell in row):
        return None
    return statistics.fmean(cell.mean for cell in row)


def read_table(grid: Grid) -> StudyTable:
    """Read what the folders of a study hold."""
    rows = [_row(grid, run) for run in grid.runs()]
    by_folder = {row.folder: row for row in rows}
    cells = [_cell(grid, [by_folder[_folder(grid, run)] for run in finals], finals) for finals in grid.finals.values()]
    study = grid.study
    return StudyTable(
        study.title,
        rows,
        cells,
        study_text(study),
        _vtab_tasks(grid),
        {dataset.name: dataset.source for dataset in study.datasets},
        study.published,
        study.base_to_novel,
        tuple(target.name for target in study.targets),
        study.reference_label,
    )


def _vtab_tasks(grid: Grid) -> dict[str, str]:
    """Dataset -> its task, where every dataset of the study is another task of VTAB-1k."""
    tasks = {dataset.name: task_of(dataset.format, dataset.path) for dataset in grid.study.datasets}
    return tasks if all(tasks.values()) and len(set(tasks.values())) == len(tasks) else {}


def _folder(grid: Grid, run: Run) -> str:
    return run.folder.relative_to(grid.output).as_posix()


def _row(grid: Grid, run: Run) -> RunRow:
    state = grid.state(run)
    candidate = run.candidate or (grid.chosen(run.cell) if state == "finished" else None)
    results = (run.results() if state == "finished" else None) or {}
    test, parameters, seconds = (results.get(key) or {} for key in ("test", "parameters", "seconds"))
    stored, wanted = results.get("bytes") or {}, results.get("main_metric")
    return RunRow(
        stage=run.stage,
        backbone=run.backbone.label,
        dataset=run.dataset.name,
        method=run.variant.label,
        seed=run.seed,
        lr=results["settings"]["lr"] if results else run.rate,
        status=state,
        val_accuracy=score(results.get("val") or {}, wanted),
        test_accuracy=score(test, wanted),
        test_mean_class_accuracy=test.get("mean_class_accuracy"),
        adapter_parameters=parameters.get("adapter"),
        head_parameters=parameters.get("head"),
        backbone_parameters=parameters.get("backbone"),
        percent=parameters.get("percent"),
        training_seconds=seconds.get("training"),
        total_seconds=seconds.get("total"),
        x=run.variant.x,
        curve=run.variant.curve,
        folder=_folder(grid, run),
        message=run.failure() if state == "failed" else None,
        metric=metric_of(test or results.get("val") or {}, wanted),
        peak_memory_bytes=results.get("peak_memory_bytes"),
        settings=values_text(candidate.shown) if candidate else None,
        training_images=(results.get("data") or {}).get("train"),
        adapter_bytes=stored.get("adapter"),
        backbone_bytes=stored.get("backbone"),
        model_bytes=stored.get("model"),
        transfer=results.get("transfer") or {},
    )


def _cell(grid: Grid, rows: Sequence[RunRow], finals: Sequence[Run]) -> Cell:
    run = finals[0]
    done = [row for row in rows if row.status == "finished"]
    searches = grid.searches[run.cell]
    failed = [each for each in searches if grid.state(each) == "failed"]
    failures = [f"{values_text(each.candidate.shown)}: {each.failure()}" for each in failed]
    failures += [f"seed {row.seed}: {row.message}" for row in rows if row.status == "failed"]
    chosen = grid.chosen(run.cell) if done else None
    sizes = [row.adapter_bytes for row in done if row.adapter_bytes is not None]
    peaks = [row.peak_memory_bytes for row in done if row.peak_memory_bytes is not None]
    return Cell(
        backbone=run.backbone.label,
        dataset=run.dataset.name,
        variant=run.variant,
        accuracies=tuple(row.accuracy for row in done),
        adapter_parameters=done[0].adapter_parameters if done else None,
        head_parameters=done[0].head_parameters if done else None,
        percent=done[0].percent if done else None,
        chosen=chosen.shown if chosen else {},
        edges=chosen.edges if chosen else frozenset(),
        seconds=statistics.fmean(row.training_seconds for row in done) if done else None,
        failures=tuple(failures),
        left=sum(row.status == "open" for row in rows),
        backbone_parameters=done[0].backbone_parameters if done else None,
        metric=done[0].metric if done else None,
        tested=not done or done[0].test_accuracy is not None,
        memory=statistics.fmean(peaks) if peaks else None,
        training_images=done[0].training_images if done else None,
        adapter_bytes=statistics.fmean(sizes) if sizes else None,
        backbone_bytes=done[0].backbone_bytes if done else None,
        model_bytes=done[0].model_bytes if done else None,
        transfer=_elsewhere(done, "accuracy"),
        refused={name: whys[0] for name, whys in _elsewhere(done, "refused").items()},
    )


def _elsewhere(rows: Sequence[RunRow], fact: str) -> dict[str, tuple[Any, ...]]:
    """Name of other data -> that fact of all runs; without those that lack it in a run."""
    names = dict.fromkeys(name for row in rows for name in row.transfer)
    found = {name: tuple(row.transfer.get(name, {}).get(fact) for row in rows) for name in names}
    return {name: facts for name, facts in found.items() if None not in facts}


def rates_only(cells: Sequence[Cell]) -> bool:
    """Whether no search of these cells has chosen anything but the rate."""
    return all(name == "lr" for cell in cells for name in cell.chosen)


EDGE = "at the edge of what was searched; the best may lie beyond"


def measured_text(cells: Sequence[Cell]) -> str:
    """What the accuracies of these cells are: "test top-1", "validation mAP"."""
    part = "test" if all(cell.tested for cell in cells) else "validation"
    words = metric_words(cell.metric for cell in cells)
    return f"{part} {'top-1' if words == TOP1 else words}"


def accuracy_title(cells: Sequence[Cell]) -> str:
    """The axis of accuracies: "test accuracy, %"."""
    return f"{measured_text(cells).replace('top-1', 'accuracy')}, %"


def _heading(cells: Sequence[Cell]) -> str:
    """The same with a capital: "Test accuracy, %"."""
    title = accuracy_title(cells)
    return title[0].upper() + title[1:]


def study_text(study: Study) -> str:
    """How the study was made, what was left out of it, and where published numbers are from."""
    left_out = f"Left out, since no folder was given: {', '.join(study.left_out)}." if study.left_out else ""
    return " ".join(text for text in (protocol_text(study), left_out, published_note(study.published)) if text)


# ------------------------------------------------------------------ tables
def _pair_table(cells: Sequence[Cell], published: Sequence[Published]) -> str:
    columns = published_columns(published, cells[0].backbone, cells[0].dataset)
    rest = ["trained", "with head", "% of backbone", "lr" if rates_only(cells) else "settings", "seconds"]
    header = ["method", measured_text(cells), *(name for name, _ in columns), *rest]
    body = []
    for cell in cells:
        counted = cell.adapter_parameters is not None
        body.append(
            [
                cell.variant.label,
                cell.accuracy_text(),
                *(numbers.get(cell.variant.label, "") for _, numbers in columns),
                f"{cell.adapter_parameters:,}" if counted else "",
                f"{cell.with_head:,}" if counted else "",
                percent_text(cell.percent) if counted else "",
                cell.settings_text() if cell.chosen else "",
                "" if cell.seconds is None else seconds_text(cell.seconds).removesuffix(" s"),
            ]
        )
    for label in only_published(columns, [cell.variant.label for cell in cells]):
        body.append([label, "", *(numbers.get(label, "") for _, numbers in columns), *["" for _ in rest]])
    return markdown_table(header, body)


def _notes(cells: Sequence[Cell]) -> list[str]:
    notes = []
    if any(cell.at_edge for cell in cells):
        notes.append("\\* " + EDGE)
    failed = [f"- {cell.variant.label}, {message}" for cell in cells for message in cell.failures]
    return notes + (["Failed:\n\n" + "\n".join(failed)] if failed else [])
