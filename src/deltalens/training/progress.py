"""A bar of the steps of the current epoch on a terminal, and nothing elsewhere."""

from __future__ import annotations

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepBar(pl.Callback):
    """Shows epoch, steps and remaining time. `print` writes a line above the bar."""

    def __init__(self):
        self.console = Console(soft_wrap=True, highlight=False)
        self.progress: Progress | None = None

    def print(self, line: str) -> None:
        self.console.print(line, markup=False)

    def on_train_start(self, trainer, module) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),
        )
        visible = trainer.is_global_zero and self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not visible)
        total = int(trainer.max_epochs * trainer.num_training_batches)
        self.steps = self.progress.add_task("training", total=total, completed=trainer.global_step)
        self.progress.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.progress.update(self.steps, completed=trainer.global_step, description=epoch)

    def on_train_end(self, trainer, module) -> None:
        self._stop()

    def on_exception(self, trainer, module, exception) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
