"""What happens beside the steps: stop on a bad loss, keep a checkpoint, write metrics.csv."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from deltalens.lifecycle.atomic import atomic_path, write_text


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class StopOnBadLoss(pl.Callback):
    """Raise NonFiniteLossError once a loss is NaN or infinite, before a checkpoint of that state can be written.

    On an accelerator the first bad step is remembered there and read every `every` steps, so that no step waits for it.
    """

    def __init__(self, checkpoint: Path | None, every: int = 50):
        self.checkpoint, self.every = checkpoint, every
        self.first_bad = torch.tensor(-1)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = outputs["loss"].detach()
        first_bad = self.first_bad.to(loss.device)
        step = torch.full_like(first_bad, trainer.global_step)  # already counts this one
        self.first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss), step, first_bad)
        if loss.device.type == "cpu" or (batch_idx + 1) % self.every == 0:
            self.check(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self.check(trainer)

    def on_validation_end(self, trainer, module) -> None:
        self.check(trainer)
        loss = float(trainer.callback_metrics.get("val_loss", 0.0))  # detectors have none
        if not math.isfinite(loss):
            raise NonFiniteLossError(self._message(f"the validation loss is {loss}", trainer.global_step, trainer))

    def check(self, trainer) -> None:
        """Raise if a bad loss was seen."""
        step = int(self.first_bad)
        if step >= 0:
            raise NonFiniteLossError(self._message("the training loss became NaN or infinite", step, trainer))

    def _message(self, what: str, step: int, trainer) -> str:
        epoch = (step - 1) // trainer.num_training_batches + 1
        kept = (
            f"The last good checkpoint is {self.checkpoint}. " if self.checkpoint and self.checkpoint.is_file() else ""
        )
        return (
            f"{what} in epoch {epoch}, step {step}; training stopped. {kept}Use a lower learning rate (--lr), "
            "--precision 32 or --clip-grad 1, and go on with --resume or start again with --overwrite"
        )


class KeepLast(pl.Callback):
    """Write `last.ckpt` after every epoch, and every `every_steps` steps, so that a kill leaves the old or the new
    one."""

    def __init__(self, path: Path, every_steps: int = 0):
        self.path, self.every_steps = path, every_steps

    def on_train_epoch_end(self, trainer, module) -> None:
        module.position = (trainer.current_epoch + 1, 0)
        self._save(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        last = batch_idx + 1 == trainer.num_training_batches  # the epoch's own checkpoint follows at once
        if self.every_steps and trainer.global_step % self.every_steps == 0 and not last:
            module.position = (trainer.current_epoch, batch_idx + 1)
            self._save(trainer)

    def _save(self, trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)  # collective; only the first process writes


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them. Lightning's own way leaves what a kill interrupts in the
    system's folder for temporary files, where nobody finds it, and holds the bytes in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


class History(pl.Callback):
    """One row of metrics per epoch, kept in checkpoints, written to metrics.csv, handed to `show` as a line and to
    `after_epoch` as it is."""

    def __init__(
        self,
        path: Path | None,
        show: Callable[[str], None] | None = None,
        after_epoch: Callable[[dict[str, float]], None] | None = None,
    ):
        self.path, self.show, self.after_epoch = path, show, after_epoch
        self.rows: list[dict[str, float]] = []
        self.earlier_seconds = 0.0  # of the epochs before a resumed run's own

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.earlier_seconds = sum(row["seconds"] for row in self.rows)

    def on_train_start(self, trainer, module) -> None:
        self._started = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_epoch_end(self, trainer, module) -> None:
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": self._rate,  # of the epoch's last step
            "train_loss": module.mean_training_loss(),
            **{f"train_{name}": value for name, value in module.mean_training_terms().items()},
            **{name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val_")},
            "seconds": time.perf_counter() - self._started,
        }
        self._started = time.perf_counter()
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        if self.path:
            write_text(self.path, as_csv(self.rows))
        if self.show:
            measured = [f"{name} {row[name]:.4f}" for name in row if name.startswith(("train_", "val_"))]
            self.show("  ".join([f"epoch {row['epoch']}/{trainer.max_epochs}", *measured, f"{row['seconds']:.1f} s"]))
        if self.after_epoch:
            self.after_epoch(row)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
