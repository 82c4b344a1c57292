"""What changes during a run, as functions of its progress from 0 to 1."""

import math
import time


class Progress:
    """Share of the run that is done: of its steps or of its wall-clock budget, whichever is further on."""

    def __init__(self, total_steps: int, budget_minutes: float | None, elapsed: float = 0.0):
        self.total_steps = total_steps
        self.budget = budget_minutes * 60 if budget_minutes else math.inf
        self.started = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all the processes of a resumed run."""
        return time.monotonic() - self.started

    def at(self, step: int) -> float:
        return min(1.0, max(step / self.total_steps, self.elapsed / self.budget))


def learning_rate(progress: float, peak: float, warmup: float, final: float) -> float:
    """Linear from 0 to `peak` during the share `warmup`, then a cosine down to `final`."""
    if progress < warmup:
        return peak * progress / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def image_size(progress: float, sizes: list[int], native_from: float) -> int:
    """The last of `sizes` from the progress `native_from` on; the ones before it share the time up to there."""
    if progress >= native_from:
        return sizes[-1]
    return sizes[min(int(progress / native_from * (len(sizes) - 1)), len(sizes) - 1)]
