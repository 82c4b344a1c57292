"""A comparison on the terminal: one bar for each method while it trains, and the table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from deltalens.studies.clip_demo_results import ClipComparison, share_text
from deltalens.studies.results import Comparison, bytes_text, percent_text, seconds_text

COLUMNS = (
    "trained",
    "with\nhead",
    "% of\nbackbone",
    "time\nin s",
    "saved for\nbackward",
    "adapter\nfile",
)


class MethodBars:
    """A context with one bar for each of the runs to come; on anything but a terminal, one line when a run is done.

    with MethodBars(console, ["Linear", "LoRA"]) as bars:
        with bars.watch("Linear", task, train_images=4800, val_images=200):
            fit(task, ...)
        bars.finish("Linear", "test 92.0 %")
    """

    def __init__(self, console: Console, names: Sequence[str]):
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        width = max(map(len, names))
        self.bars: dict[str, TaskID] = {
            name: self.progress.add_task(f"{name:<{width}}", start=False, total=1.0, note="") for name in names
        }

    def __enter__(self) -> MethodBars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @contextlib.contextmanager
    def watch(self, name: str, task: nn.Module, train_images: int, val_images: int, prefix: str = "") -> Iterator[None]:
        """Within the context the bar of this name follows what the task is given: (images, labels) batches.

        train_images: how many it will be trained on, all epochs together. val_images: the size of the validation set,
        whose accuracy is shown as it comes in. prefix: what to show before it.
        """
        bar = self.bars[name]
        self.progress.reset(bar)
        follow = _Follow(self.progress, bar, train_images, val_images, prefix)
        handle = task.register_forward_hook(follow)
        try:
            yield
        finally:
            handle.remove()

    def finish(self, name: str, note: str) -> None:
        """Leave the bar full, with a last note."""
        self.progress.update(self.bars[name], completed=1.0, note=note)
        self.progress.stop_task(self.bars[name])
        if not self.console.is_terminal:
            self.console.print(f"{name}: {note}", highlight=False)


class _Follow:
    """A forward hook of a task that moves a bar."""

    def __init__(self, progress: Progress, bar: TaskID, train_images: int, val_images: int, prefix: str):
        self.progress, self.bar, self.prefix = progress, bar, prefix
        self.train_images, self.val_images = train_images, val_images
        self.trained = self.judged = self.right = 0
        self.note = prefix

    def __call__(self, task: nn.Module, inputs: tuple[Any, ...], result: dict[str, Any]) -> None:
        labels = inputs[0][1]
        if task.training:
            self.trained += len(labels)
            self.judged = self.right = 0
        elif self.judged < self.val_images and isinstance(result["output"], Tensor):  # of one label for each image
            self.judged += len(labels)
            self.right += int((result["output"].argmax(1) == labels).sum())
            self.note = f"{self.prefix}val {100 * self.right / self.judged:.1f} %"
        self.progress.update(self.bar, completed=self.trained / self.train_images, note=self.note)


def comparison_table(comparison: Comparison) -> Table:
    """The report's table, for rich; at most 80 columns wide where method names have up to 11 letters."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True, vertical="bottom")
    for name in (comparison.metric, *COLUMNS):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    best = max(run.accuracy for run in comparison.runs)
    for run in comparison.runs:
        accuracy = f"{100 * run.accuracy:.1f} %"
        table.add_row(
            run.method,
            f"[bold]{accuracy}[/bold]" if run.accuracy == best else accuracy,
            f"{run.adapter_parameters:,}",
            f"{run.trained_parameters:,}",
            percent_text(run.percent),
            seconds_text(run.seconds).removesuffix(" s"),
            bytes_text(run.saved_bytes),
            bytes_text(run.adapter_bytes),
        )
    return table


def clip_table(comparison: ClipComparison) -> Table:
    """The table of the demonstration of CLIP, for rich."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True, vertical="bottom")
    for name in ("base", "novel", "harmonic\nmean", "trained", "% of\nCLIP", "seconds"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    best = max((run.mean for run in comparison.runs if run.mean is not None), default=None)
    for run in comparison.runs:
        mean = share_text(run.mean)
        table.add_row(
            run.method,
            share_text(run.base),
            share_text(run.novel),
            f"[bold]{mean}[/bold]" if run.mean is not None and run.mean == best else mean,
            f"{run.parameters:,}",
            percent_text(run.percent),
            seconds_text(run.seconds).removesuffix(" s") if run.parameters else "-",
        )
    return table
