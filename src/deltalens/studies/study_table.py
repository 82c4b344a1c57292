"""What the runs of a study found: a row per method as Markdown, and a row per run as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from deltalens.data.vtab1k import task_of
from deltalens.studies.grid import Grid
from deltalens.studies.markdown import markdown_table
from deltalens.studies.results import percent_text, seconds_text
from deltalens.studies.storage import storage_parts
from deltalens.studies.study import Variant
from deltalens.studies.trial import Run, score
from deltalens.studies.vtab_table import vtab_parts


@dataclass(frozen=True)
class RunRow:
    """One run, a line of runs.csv. Accuracies are fractions (metric says of what: "accuracy", or "mAP" where images
    have several labels); what is not known is None."""

    stage: str
    backbone: str
    dataset: str
    method: str
    seed: int
    lr: float | None
    status: str
    val_accuracy: float | None
    test_accuracy: float | None
    test_mean_class_accuracy: float | None
    adapter_parameters: int | None
    head_parameters: int | None
    backbone_parameters: int | None
    percent: float | None
    training_seconds: float | None
    total_seconds: float | None
    x: float | None
    curve: str | None
    folder: str
    message: str | None
    metric: str | None = None
    peak_memory_bytes: int | None = None
    training_images: int | None = None
    adapter_bytes: int | None = None
    backbone_bytes: int | None = None
    model_bytes: int | None = None

    @property
    def accuracy(self) -> float | None:
        """What methods are compared by: on the test images, on those for validation where there is no test."""
        return self.val_accuracy if self.test_accuracy is None else self.test_accuracy


@dataclass(frozen=True)
class Cell:
    """One method on one backbone and dataset: its final runs together.

    accuracies: on the test images (validation where there is no test), of the finished runs, in the order of the
    seeds. lr: the chosen rate; at_edge: it is the smallest or largest candidate of a search. failures: messages, of
    the searches too. left: final runs that are neither finished nor failed. tested: accuracies are on test
    images. memory: most GPU memory of training in bytes, the mean over runs; None where runs were not on a GPU.
    training_images: that a run was trained on. adapter_bytes: on disk with the head, the mean over runs;
    backbone_bytes, model_bytes: of the plain backbone without and with the head; None where the results do not say.
    """

    backbone: str
    dataset: str
    variant: Variant
    accuracies: tuple[float, ...]
    adapter_parameters: int | None
    head_parameters: int | None
    percent: float | None
    lr: float | None
    at_edge: bool
    seconds: float | None
    failures: tuple[str, ...]
    left: int
    backbone_parameters: int | None = None
    metric: str | None = None
    tested: bool = True
    memory: float | None = None
    training_images: int | None = None
    adapter_bytes: float | None = None
    backbone_bytes: int | None = None
    model_bytes: int | None = None

    @property
    def with_head(self) -> int | None:
        """Trained parameters, head included."""
        return None if self.adapter_parameters is None else self.adapter_parameters + self.head_parameters

    @property
    def complete(self) -> bool:
        """Whether every final run has finished."""
        return self.mean is not None and not self.left and not self.failures_of_finals

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def accuracy_text(self) -> str:
        """ "91.2 ± 0.4", with what is missing said; "failed" or "-" where there is nothing."""
        if self.mean is None:
            return "failed" if self.failures and not self.left else "-"
        text = f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if self.std is not None else "")
        failed = len(self.failures_of_finals)
        notes = ([f"{failed} failed"] if failed else []) + ([f"{self.left} to come"] if self.left else [])
        return text + (f" ({', '.join(notes)})" if notes else "")

    @property
    def failures_of_finals(self) -> list[str]:
        return [message for message in self.failures if message.startswith("seed ")]


@dataclass(frozen=True)
class StudyTable:
    """All that is there of a study at the moment."""

    title: str
    rows: list[RunRow]
    cells: list[Cell]
    description: str
    vtab_tasks: dict[str, str] = field(default_factory=dict)  # dataset -> task, where all datasets are VTAB-1k's
    sources: dict[str, str] = field(default_factory=dict)  # dataset -> the one it is a part of, or itself

    # ------------------------------------------------------------------ texts
    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(RunRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in self.rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """An overview over all backbones and datasets, where there are several, then one table for each."""
        pairs = list(dict.fromkeys((cell.backbone, cell.dataset) for cell in self.cells))
        parts = [f"# {self.title}", self.description]
        if len(pairs) > 1:
            header, body = overview(self.cells)
            lines = [[label, *(text for text, _ in line)] for label, line in body.items()]
            parts += [
                f"## {'Test' if all(cell.tested for cell in self.cells) else 'Validation'} accuracy, %",
                markdown_table(["method", *header], lines),
            ]
        for backbone in dict.fromkeys(backbone for backbone, _ in pairs) if self.vtab_tasks else ():
            cells = [cell for cell in self.cells if cell.backbone == backbone]
            parts += [f"## VTAB-1k, {backbone}", *vtab_parts(cells, self.vtab_tasks)]
        for backbone, dataset in pairs:
            cells = [cell for cell in self.cells if (cell.backbone, cell.dataset) == (backbone, dataset)]
            parts += [f"## {backbone}, {dataset}", _pair_table(cells), *_notes(cells)]
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
    sources = {dataset.name: dataset.source for dataset in grid.study.datasets}
    return StudyTable(grid.study.title, rows, cells, _description(grid), _vtab_tasks(grid), sources)


def _vtab_tasks(grid: Grid) -> dict[str, str]:
    """Dataset -> its task, where every dataset of the study is another task of VTAB-1k."""
    tasks = {dataset.name: task_of(dataset.format, dataset.path) for dataset in grid.study.datasets}
    return tasks if all(tasks.values()) and len(set(tasks.values())) == len(tasks) else {}


def _folder(grid: Grid, run: Run) -> str:
    return run.folder.relative_to(grid.output).as_posix()


def _row(grid: Grid, run: Run) -> RunRow:
    results = run.results() or {}
    test, parameters, seconds = (results.get(key) or {} for key in ("test", "parameters", "seconds"))
    stored = results.get("bytes") or {}
    return RunRow(
        stage=run.stage,
        backbone=run.backbone.label,
        dataset=run.dataset.name,
        method=run.variant.label,
        seed=run.seed,
        lr=results["settings"]["lr"] if results else run.rate,
        status=grid.state(run),
        val_accuracy=score(results.get("val") or {}),
        test_accuracy=score(test),
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
        message=None if results else run.failure(),
        metric=next((name for name in ("accuracy", "mAP") if name in (test or results.get("val") or {})), None),
        peak_memory_bytes=results.get("peak_memory_bytes"),
        training_images=(results.get("data") or {}).get("train"),
        adapter_bytes=stored.get("adapter"),
        backbone_bytes=stored.get("backbone"),
        model_bytes=stored.get("model"),
    )


def _cell(grid: Grid, rows: Sequence[RunRow], finals: Sequence[Run]) -> Cell:
    run = finals[0]
    done = [row for row in rows if row.status == "finished"]
    searches = grid.searches[run.cell]
    failures = [f"lr {each.rate:g}: {each.failure()}" for each in searches if grid.state(each) == "failed"]
    failures += [f"seed {row.seed}: {row.message}" for row in rows if row.status == "failed"]
    lr = done[0].lr if done else None
    rates = [each.rate for each in searches]
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
        lr=lr,
        at_edge=bool(rates) and lr in (min(rates), max(rates)),
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
    )


def measured_text(cells: Sequence[Cell]) -> str:
    """What the accuracies of these cells are: "test top-1", "validation mAP"."""
    part = "test" if all(cell.tested for cell in cells) else "validation"
    return f"{part} {'mAP' if any(cell.metric == 'mAP' for cell in cells) else 'top-1'}"


def accuracy_title(cells: Sequence[Cell]) -> str:
    """The axis of accuracies: "test accuracy, %"."""
    return f"{measured_text(cells).replace('top-1', 'accuracy')}, %"


def _description(grid: Grid) -> str:
    study, training = grid.study, grid.study.training
    factors = ", ".join(f"{factor:g}" for factor in sorted(study.rates))
    if len(study.rates) > 1:
        tried = (
            f"best of {len(study.rates)} ({factors} times the method's own) on the validation images after the last "
        )
        tried += "epoch, with the first seed"
    else:
        tried = f"{study.fixed_rate:g}" if study.fixed_rate else "the method's own default"
    joined = [dataset.name for dataset in study.datasets if dataset.protocol == "trainval"]
    together = f" Final runs on {', '.join(joined)} train on training and validation images together." if joined else ""
    return (
        f"{training.epochs} epochs, batches of {training.batch_size}, {training.optimizer}, weight decay "
        f"{training.weight_decay:g}; seeds {', '.join(map(str, study.seeds))}. Learning rate: {tried}. Test images are "
        "looked at once, after the last epoch. Top-1 accuracy in per cent: mean ± sample standard deviation over seeds."
        + together
    )


# ------------------------------------------------------------------ tables
def _pair_table(cells: Sequence[Cell]) -> str:
    header = ["method", measured_text(cells), "trained", "with head", "% of backbone", "lr", "seconds"]
    body = []
    for cell in cells:
        counted = cell.adapter_parameters is not None
        body.append(
            [
                cell.variant.label,
                cell.accuracy_text(),
                f"{cell.adapter_parameters:,}" if counted else "",
                f"{cell.with_head:,}" if counted else "",
                percent_text(cell.percent) if counted else "",
                "" if cell.lr is None else f"{cell.lr:g}" + (" *" if cell.at_edge else ""),
                "" if cell.seconds is None else seconds_text(cell.seconds).removesuffix(" s"),
            ]
        )
    return markdown_table(header, body)


def _notes(cells: Sequence[Cell]) -> list[str]:
    notes = []
    if any(cell.at_edge for cell in cells):
        notes.append("\\* the smallest or largest rate that was tried")
    failed = [f"- {cell.variant.label}, {message}" for cell in cells for message in cell.failures]
    return notes + (["Failed:\n\n" + "\n".join(failed)] if failed else [])
