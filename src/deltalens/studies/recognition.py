"""Which dataset does a sample come from? How well the features of each stage of a tower tell.

After the question of figure 1 in MMA (Yang et al., CVPR 2024): the more a layer knows about where a sample comes from,
the more there is in it that belongs to one dataset alone. The paper's sampling, pooling and classifier are not public.
What is done here is our own procedure, for each stage and each seed s:

    n samples of every dataset, drawn with s; 30 % of each dataset's samples, drawn with s, are held out
    x   = (features - mean) / standard deviation, both of the samples that are not held out
    p   = softmax(W x + b), fitted to those with the penalty |W|^2 / 2        (multinomial logistic regression)
    accuracy = share of the held-out samples whose dataset has the largest p

and mean and standard deviation over the seeds. All datasets count alike, so that chance is 1 / datasets. The samples of
a tower are rows in units: an image is a unit of one row, a class is a unit of one row for each template. Units are
drawn and held out whole, so that no class has texts on both sides.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltalens.studies.layer_features import Stages

HOLD_OUT = 0.3
STEPS = 2000  # of the solver, at most
NOISE = 1e-5  # of the size of a usual feature: what varies less than this is rounding


@dataclass(frozen=True)
class Draws:
    """Which samples each seed takes. sizes: units of each dataset. count: units that are drawn of each. seeds: one draw
    for each. rows: samples in a unit.

    Raises ValueError for fewer than two datasets, fewer than two units in one, or no seed.
    """

    sizes: tuple[int, ...]
    count: int
    seeds: tuple[int, ...]
    rows: int = 1

    def __post_init__(self) -> None:
        if len(self.sizes) < 2:
            raise ValueError(f"datasets are told from each other: two or more are needed, got {len(self.sizes)}")
        if not self.seeds:
            raise ValueError("there is no seed to draw with")
        if not 2 <= self.count <= min(self.sizes):
            raise ValueError(
                f"{self.count} units of each dataset cannot be drawn and held out: 2 to {min(self.sizes)} can"
            )

    @property
    def held_out(self) -> int:
        """Units of each dataset that are held out."""
        return min(max(1, round(HOLD_OUT * self.count)), self.count - 1)

    def parts(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(units to learn from, units held out) of each dataset."""
        drawn = [np.random.default_rng((seed, i)).permutation(size)[: self.count] for i, size in enumerate(self.sizes)]
        return [(units[self.held_out :], units[: self.held_out]) for units in drawn]

    @cached_property
    def units(self) -> list[np.ndarray]:
        """Units of each dataset that any seed takes, in order: features are wanted of these."""
        of_seeds = [self.parts(seed) for seed in self.seeds]
        return [
            np.unique(np.concatenate([np.concatenate(parts[i]) for parts in of_seeds])) for i in range(len(self.sizes))
        ]

    def rows_of(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(rows to learn from, their datasets, rows held out, their datasets). Rows count through the `units` of the
        first dataset, then of the second..."""
        starts = np.cumsum([0, *(len(units) for units in self.units)])
        found: list[list[np.ndarray]] = [[], []]
        for i, parts in enumerate(self.parts(seed)):
            for side, units in zip(found, parts, strict=True):
                places = starts[i] + np.searchsorted(self.units[i], units)
                side.append((places[:, None] * self.rows + np.arange(self.rows)).ravel())
        labels = [np.repeat(np.arange(len(self.sizes)), [len(rows) for rows in side]) for side in found]
        return np.concatenate(found[0]), labels[0], np.concatenate(found[1]), labels[1]


@dataclass(frozen=True)
class StageAccuracy:
    """How well a stage of a tower tells the datasets apart: the accuracy of each seed. learnt, held_out: samples."""

    tower: str
    stage: str
    accuracies: tuple[float, ...]
    learnt: int
    held_out: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Of the sample; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def recognition(stages: Stages, draws: Draws) -> list[StageAccuracy]:
    """The accuracy of every stage. The rows of the features are those of `draws.units`, dataset by dataset."""
    wanted = sum(len(units) for units in draws.units) * draws.rows
    if len(stages.features[0]) != wanted:
        raise ValueError(f"features of {wanted} samples are wanted, got {len(stages.features[0])}")
    found = []
    for name, features in zip(stages.names, stages.features, strict=True):
        accuracies = []
        for seed in draws.seeds:
            learnt, of_learnt, held, of_held = draws.rows_of(seed)
            accuracies.append(held_out_accuracy(features[learnt], of_learnt, features[held], of_held))
        found.append(StageAccuracy(stages.tower, name, tuple(accuracies), len(learnt), len(held)))
    return found


def held_out_accuracy(learnt: np.ndarray, of_learnt: np.ndarray, held: np.ndarray, of_held: np.ndarray) -> float:
    """Of a multinomial logistic regression on standardised features (n, d), fitted to one part, on the other. A feature
    that is constant but for rounding counts for nothing."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = learnt.mean(0, dtype=np.float64), learnt.std(0, dtype=np.float64)
    usual = np.median(np.sqrt(mean**2 + spread**2))  # a few features of a transformer are hundreds of times larger
    varies = spread > NOISE * usual
    if not varies.any():  # one answer for all
        return float(np.mean(of_held == of_learnt[0]))
    x, y = ((part[:, varies] - mean[varies]) / spread[varies] for part in (learnt, held))
    return float(LogisticRegression(max_iter=STEPS).fit(x, of_learnt).score(y, of_held))
