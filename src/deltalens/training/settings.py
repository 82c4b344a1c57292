"""How to train: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from deltalens.training.schedule import DECAYS, SCHEDULES

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run. Raises ValueError for values that make no sense.

    epochs: passes over the training data. batch_size: images a step, over all devices together. lr: peak learning
    rate. warmup_epochs: length of the warm-up (fractions allowed with schedule "step"), linear, or at the constant rate
    warmup_lr. decay: what follows, a "cosine" or a "linear" fall to min_lr, a share of lr, or "steps": a tenth of the
    rate from each of the epochs decay_at on. schedule: "step" changes the rate at every step, "epoch" once an epoch, as
    Dassl does (`deltalens.training.schedule.RateSchedule`). optimizer: adamw, or sgd with momentum 0.9.
    eps: what AdamW adds to its denominators. no_decay: weight decay acts on all trained parameters but those whose
    path has one of these texts in it; None for matrices of linear and convolution layers only. clip_grad: largest norm
    of the gradient, 0 for no clipping. seed: of everything random. workers: loader processes. precision: 32, bf16 or 16
    (mixed), 64. compile: torch.compile the model. devices: how many, or "0,2", or "auto". accelerator: cpu, gpu, mps or
    auto. deterministic: torch's deterministic algorithms, needed for bit-equal runs on a GPU and on several processor
    threads. checkpoint_every_steps: besides every epoch, 0 for never. progress: print a line per epoch, and a bar on a
    terminal.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    decay: str = "cosine"
    decay_at: tuple[float, ...] = ()
    schedule: str = "step"
    warmup_lr: float | None = None
    optimizer: str = "adamw"
    eps: float = 1e-8
    no_decay: tuple[str, ...] | None = None
    clip_grad: float = 0.0
    seed: int = 0
    workers: int = 0
    precision: str = "32"
    compile: bool = False
    devices: int | str = 1
    accelerator: str = "auto"
    deterministic: bool = False
    checkpoint_every_steps: int = 0
    progress: bool = True

    def __post_init__(self):
        positive = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr, "eps": self.eps}
        if self.warmup_lr is not None:
            positive["warmup_lr"] = self.warmup_lr
        other = {
            "weight_decay": self.weight_decay,
            "warmup_epochs": self.warmup_epochs,
            "clip_grad": self.clip_grad,
            "seed": self.seed,
            "workers": self.workers,
            "checkpoint_every_steps": self.checkpoint_every_steps,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in other.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"min_lr is a share of lr, between 0 and 1, got {self.min_lr}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if (self.decay == "steps") != bool(self.decay_at):
            raise ValueError(
                f"decay_at names the epochs of decay='steps', got {list(self.decay_at)} with decay={self.decay!r}"
            )
        if any(not 0 < each < self.epochs for each in self.decay_at):
            raise ValueError(f"decay_at must lie within the {self.epochs} epochs, got {list(self.decay_at)}")
        if self.decay == "steps" and self.min_lr:
            raise ValueError("min_lr is where a cosine or a line ends: leave it out with decay='steps'")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.schedule == "epoch" and self.warmup_epochs != round(self.warmup_epochs):
            raise ValueError(
                f"warmup_epochs must be a whole number where the rate changes once an epoch, got {self.warmup_epochs:g}"
            )
        if isinstance(self.no_decay, str):
            raise ValueError(f"no_decay must be a list of texts, or None, got {self.no_decay!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {self.optimizer!r}")
