"""Warm-up, then a fall along a cosine, a line or steps, changed at every optimiser step or once an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("step", "epoch")
STEP = 0.1  # what each of the steps leaves of the rate


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _line(progress: float) -> float:
    return 1 - progress


CURVES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _line}
"""What is left of the rate, 1 to 0, by progress, 0 to 1."""
DECAYS = (*CURVES, "steps")


def warmup_decay_factor(
    step: int, warmup_steps: int, total_steps: int, least: float = 0.0, curve: Callable[[float], float] = _cosine
) -> float:
    """Factor on the learning rate at `step` = 0, 1, ..., total_steps - 1.

    (step + 1) / (warmup_steps + 1) during warm-up, then least + (1 - least) curve(t) with t from 0 towards 1 at
    total_steps; the cosine is (1 + cos(pi t)) / 2.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return least + (1 - least) * curve(progress)


@dataclass(frozen=True)
class RateSchedule:
    """Learning rates of a training, as a factor on the peak rate.

    Both kinds warm up over `warmup_epochs`, linearly, or at the constant `warmup_lr`, which is then the rate of every
    group, whatever its peak.

    * kind "step": the rate changes at every step; the curve takes what the warm-up leaves of the steps.
    * kind "epoch": it changes once an epoch, as in Dassl, on which CoOp and those after it are built. In epoch
      e = warmup_epochs, warmup_epochs + 1, ... of E the progress of the curve is t = (e - warmup_epochs) / E: it
      begins anew behind the warm-up and is as long as all epochs, so that with a warm-up it does not reach its end.
      Five epochs at 0.0035 with one of warm-up at 1e-5: 1e-5, 0.0035, 0.00317, 0.00229, 0.00121.

    The curve is a cosine or, with decay="linear", a line, as segmentation is trained (mmcv's begins with the warm-up).
    With decay="steps" there is none: the rate is a tenth from each of the epochs `decay_at` on, which are counted from
    the start of training, as detection is trained.

    At least one step, or epoch, is no warm-up.
    """

    total_steps: int
    epochs: int
    warmup_epochs: float = 0.0
    least: float = 0.0
    kind: str = "step"
    warmup_lr: float | None = None
    decay: str = "cosine"
    decay_at: Sequence[float] = ()

    def factor(self, step: int, peak: float) -> float:
        """Of the step, counted from 0; peak: the group's rate, which the factor is multiplied with."""
        if self.kind == "step":
            place, warmup = step, min(round(self.warmup_epochs * self.total_steps / self.epochs), self.total_steps - 1)
            total = self.total_steps
        else:
            place = step // max(1, self.total_steps // self.epochs)
            warmup = min(round(self.warmup_epochs), self.epochs - 1)
            total = warmup + self.epochs
        if self.warmup_lr is not None and place < warmup:
            return self.warmup_lr / peak
        curve = CURVES.get(self.decay, lambda progress: self._of_steps(step))
        return warmup_decay_factor(place, warmup, total, self.least, curve)

    def _of_steps(self, step: int) -> float:
        epoch = step * self.epochs / self.total_steps
        return STEP ** sum(epoch >= each for each in self.decay_at)

    def scheduler(self, optimizer: Optimizer, peaks: Sequence[float]) -> LambdaLR:
        """To be stepped after every optimiser step. peaks: of the optimiser's groups."""

        def of(peak: float) -> Callable[[int], float]:
            return lambda step: self.factor(step, peak)

        return LambdaLR(optimizer, [of(peak) for peak in peaks])
