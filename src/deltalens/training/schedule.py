"""Linear warm-up, then half a cosine, per optimiser step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, warmup_steps: int, total_steps: int, least: float = 0.0) -> float:
    """Factor on the learning rate at `step` = 0, 1, ..., total_steps - 1.

    (step + 1) / (warmup_steps + 1) during warm-up, then least + (1 - least) (1 + cos(pi t)) / 2 with t from 0 towards 1
    at total_steps.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, least: float = 0.0) -> LambdaLR:
    """A scheduler to be stepped after every optimiser step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, warmup_steps, total_steps, least))
