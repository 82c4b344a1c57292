"""A task as a LightningModule: steps, metrics, optimiser, and checkpoints that hold no frozen weights."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import MeanMetric

from deltalens.data.splits import Splits
from deltalens.lifecycle.prepare import finish, prepare, remarks
from deltalens.lifecycle.state import KEY
from deltalens.tasks.gradients import backward, gradient_rule
from deltalens.training.loaders import evaluation_loader, mixed_seed, preparation_loader, training_loader
from deltalens.training.optim import make_optimizer, parameter_groups, trains_nothing
from deltalens.training.schedule import RateSchedule
from deltalens.training.settings import TrainingSettings

PROGRESS = "deltalens_progress"


class TaskModule(pl.LightningModule):
    """Runs any task whose forward gives {"loss", "output"} on any `Splits`. A task whose loss is None in eval mode (a
    detector's) says so by `has_evaluation_loss = False`; then there is no validation loss.

    Random numbers of a training step depend on (seed, step, process) only, so that a run resumed from a checkpoint
    goes on exactly as if it had not been stopped. Checkpoints hold trained parameters and buffers, not the frozen
    backbone.

    finishing: let methods choose settings on the validation images before these are measured next; `chosen` then holds
    them. position: (epoch, batches) the next step belongs to; `PROGRESS` in checkpoints. resumed_at: where this run
    begins.
    """

    def __init__(
        self, task: torch.nn.Module, data: Splits, settings: TrainingSettings, resumed_at: tuple[int, int] = (0, 0)
    ):
        super().__init__()
        self.task, self.data, self.settings = task, data, settings
        self.position = self.resumed_at = resumed_at
        self.strict_loading = False
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.term_sums: dict[str, torch.Tensor] = {}
        self.result: dict[str, Any] | None = None
        self.finishing = False
        self.chosen: dict[str, dict[str, Any]] = {}

    # ------------------------------------------------------------------ data
    def train_dataloader(self):
        return training_loader(
            self.data.train,
            self._batch_size(),
            self.settings.seed,
            self.settings.workers,
            self.resumed_at,
            *self._process(),
        )

    def val_dataloader(self):
        return evaluation_loader(self.data.val, self._batch_size(), self.settings.workers, *self._process())

    def test_dataloader(self):
        return evaluation_loader(self.data.test, self._batch_size(), self.settings.workers, *self._process())

    def _batch_size(self) -> int:
        return max(1, self.settings.batch_size // self.trainer.world_size)

    def _process(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    # ------------------------------------------------------------------ optimiser
    def configure_optimizers(self):
        if trains_nothing(self.task):
            return None
        groups = self._groups()
        optimizer = make_optimizer(self.settings.optimizer, groups, self.settings.eps)
        scheduler = self._schedule().scheduler(optimizer, [group["lr"] for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        return parameter_groups(self.task, settings.lr, settings.weight_decay, settings.no_decay)

    def _schedule(self) -> RateSchedule:
        settings = self.settings
        return RateSchedule(
            int(self.trainer.estimated_stepping_batches),
            settings.epochs,
            settings.warmup_epochs,
            settings.min_lr,
            settings.schedule,
            settings.warmup_lr,
            settings.decay,
            settings.decay_at,
        )

    def _use_rates_of_settings(self) -> None:
        """Learning rates and weight decay come from the settings, also where a checkpoint has brought others."""
        groups, schedule = self._groups(), self._schedule()
        scheduler = self.lr_schedulers()
        scheduler.base_lrs = [group["lr"] for group in groups]
        for present, wanted in zip(self.optimizers().param_groups, groups, strict=True):
            factor = schedule.factor(self.global_step, wanted["lr"])
            present["lr"], present["weight_decay"] = wanted["lr"] * factor, wanted["weight_decay"]
            if "eps" in present:
                present["eps"] = self.settings.eps

    # ------------------------------------------------------------------ steps
    def on_fit_start(self) -> None:
        """Methods take from the training data what they need; in a resumed run that comes from the checkpoint."""
        if KEY in self.task.model.__dict__ and self.trainer.ckpt_path is None:
            settings = self.settings
            prepare(
                self.task.model,
                preparation_loader(self.data.train, self._batch_size(), settings.seed, settings.workers),
            )

    def _check_gradient_rule(self) -> None:
        rule = gradient_rule(self.task.model)
        if rule is None:
            return
        if self.trainer.world_size > 1:
            raise ValueError(f"{rule.name} has a gradient rule, which works on one device: set devices=1")
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError(f"{rule.name} has a gradient rule, which wants whole batches: do not accumulate gradients")

    def on_train_start(self) -> None:
        self._check_gradient_rule()
        self.task.train()
        self._use_rates_of_settings()

    def on_train_epoch_start(self) -> None:
        self.task.train()  # through the model's own train(), which holds frozen modules in eval mode
        self.loss_sum, self.loss_count = torch.zeros((), device=self.device), 0
        self.term_sums = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        torch.manual_seed(mixed_seed(self.settings.seed, self.global_step, self.trainer.global_rank))
        result = self.task(batch)
        loss = result["loss"]
        self.result = result if gradient_rule(self.task.model) is not None else None
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        self.loss_count += 1
        terms = result.get("losses", {})
        for name, term in terms.items() if len(terms) > 1 else ():
            self.term_sums[name] = self.term_sums.get(name, loss.new_zeros(())).to(loss.device) + term.detach()
        return loss

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's, or that of a method with a gradient rule."""
        if self.result is None:
            super().backward(loss, *args, **kwargs)
            return
        result, self.result = self.result, None
        backward(self.task, result, loss)

    def mean_training_loss(self) -> float:
        """Over this epoch so far, and over all processes."""
        totals = torch.stack([self.loss_sum, self.loss_sum.new_tensor(self.loss_count)])
        total, count = self.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        return total / count

    def mean_training_terms(self) -> dict[str, float]:
        """The same of each term of the loss, where it has several: the task's and those of methods."""
        if not self.term_sums:
            return {}
        totals = torch.stack([*self.term_sums.values(), self.loss_sum.new_tensor(self.loss_count)])
        *sums, count = self.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        return {name: total / count for name, total in zip(self.term_sums, sums, strict=True)}

    def remark(self) -> None:
        """Warn of what methods see in the trained model."""
        if KEY in self.task.model.__dict__ and self.trainer.is_global_zero:
            settings = self.settings
            loader = preparation_loader(self.data.train, self._batch_size(), settings.seed, settings.workers)
            for text in remarks(self.task.model, loader):
                warnings.warn(text, stacklevel=2)

    # ------------------------------------------------------------------ evaluation
    def on_validation_start(self) -> None:
        """All of the images in every process, so that all choose the same."""
        if self.finishing:
            self.finishing = False
            loader = evaluation_loader(self.data.val, self._batch_size(), self.settings.workers)
            self.chosen = finish(self.task.model, loader)

    def _start_evaluation(self) -> None:
        self.metrics = self.task.new_metrics().to(self.device)
        self.mean_loss = MeanMetric().to(self.device)

    def _evaluate(self, batch: Any) -> None:
        result = self.task(batch)
        self.task.update_metrics(self.metrics, result, batch)
        if result["loss"] is not None:
            self.mean_loss.update(result["loss"], len(batch[0]))

    def _has_evaluation_loss(self) -> bool:
        return getattr(self.task, "has_evaluation_loss", True)

    def _log_evaluation(self, part: str) -> None:
        measured = {"loss": self.mean_loss.compute()} if self._has_evaluation_loss() else {}
        values = {**measured, **self.metrics.compute()}
        self.log_dict({f"{part}_{name}": value for name, value in values.items()})

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    # ------------------------------------------------------------------ checkpoints
    def _frozen_names(self) -> set[str]:
        return {
            name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = self._frozen_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[PROGRESS] = {
            "epoch": self.position[0],
            "batches": self.position[1],
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "term_sums": {name: float(total) for name, total in self.term_sums.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self.state_dict().keys() - self._frozen_names()
        differing = sorted(trained ^ checkpoint["state_dict"].keys())
        if differing:
            raise ValueError(
                f"the checkpoint holds other tensors than this run trains ({len(differing)} differ, the first is "
                f"{differing[0]}): resume with the model and the method it was started with"
            )
        self.loss_sum = torch.tensor(checkpoint[PROGRESS]["loss_sum"])
        self.loss_count = checkpoint[PROGRESS]["loss_count"]
        terms = checkpoint[PROGRESS].get("term_sums", {})  # files of earlier versions have none
        self.term_sums = {name: torch.tensor(total) for name, total in terms.items()}
