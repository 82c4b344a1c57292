"""Is one method better than another, or was it chance: ranks over tasks, and paired tests against one method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltalens.studies.cells import Cell, RunRow

LEAST_WILCOXON = 6  # with fewer pairs no result of the two-sided test has p < 0.05
LEAST_T = 3
LEAST_TASKS_FOR_DISTANCE = 10  # below, the chi-square of Friedman's test is too rough (Demsar 2006)
LEVEL = 0.05
Task = tuple[str, str]  # backbone, dataset


# ------------------------------------------------------------------ ranks
@dataclass(frozen=True)
class Rank:
    """One method's ranks, one for each task; 1 is best, equals share the mean of their ranks."""

    label: str
    ranks: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ranks)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over tasks; None for one task."""
        return statistics.stdev(self.ranks) if len(self.ranks) > 1 else None


@dataclass(frozen=True)
class Ranking:
    """Methods by mean rank, best first. tasks: those in which each of them has a result. left_out: methods without a
    result anywhere. friedman: p that all are alike; None for fewer than three methods or two tasks. distance: mean
    ranks further apart than this differ (Nemenyi, 0.05); None where that is not well founded."""

    rows: tuple[Rank, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[str, ...]
    friedman: float | None
    distance: float | None


def rank_methods(cells: Sequence[Cell]) -> Ranking | None:
    """Rank the methods in every task (a backbone with a dataset). None where fewer than two methods share a task.

    The critical distance is given only where it is well founded: one backbone (tasks that share images are no
    independent samples), ten datasets at least, and Friedman's test below 0.05.
    """
    from scipy.stats import rankdata

    means = {((cell.backbone, cell.dataset), cell.variant.label): cell.mean for cell in cells if cell.mean is not None}
    labels = list(dict.fromkeys(cell.variant.label for cell in cells))
    present = [label for label in labels if any(label == found for _, found in means)]
    tasks = [task for task in tasks_of(cells) if all((task, label) in means for label in present)]
    if len(present) < 2 or not tasks:
        return None
    table = [rankdata([-means[task, label] for label in present]).tolist() for task in tasks]
    rows = [Rank(label, tuple(ranks[i] for ranks in table)) for i, label in enumerate(present)]
    friedman = friedman_p([[means[task, label] for task in tasks] for label in present])
    founded = len({backbone for backbone, _ in tasks}) == 1 and len(tasks) >= LEAST_TASKS_FOR_DISTANCE
    founded = founded and friedman is not None and friedman < LEVEL
    return Ranking(
        tuple(sorted(rows, key=lambda row: row.mean)),
        tuple(tasks),
        tuple(label for label in labels if label not in present),
        friedman,
        critical_distance(len(present), len(tasks)) if founded else None,
    )


def friedman_p(values: Sequence[Sequence[float]]) -> float | None:
    """Friedman's test; values: for each method one value per task."""
    from scipy.stats import friedmanchisquare

    if len(values) < 3 or len(values[0]) < 2:
        return None
    p = float(friedmanchisquare(*values).pvalue)
    return 1.0 if math.isnan(p) else p  # all equal in every task


def critical_distance(methods: int, tasks: int) -> float:
    """Nemenyi's: q sqrt(k (k + 1) / (6 n)), q the 0.95 quantile of the studentised range over sqrt(2)."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


# ------------------------------------------------------------------ paired tests
@dataclass(frozen=True)
class PairedTest:
    """One method against the reference. differences: method minus reference, fractions, one for each pair. test: what
    was computed, or why nothing was. p: two-sided; adjusted: by Holm over all methods that were tested."""

    label: str
    differences: tuple[float, ...]
    test: str
    p: float | None
    adjusted: float | None = None

    @property
    def pairs(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def wins(self) -> int:
        return sum(difference > 0 for difference in self.differences)

    @property
    def ties(self) -> int:
        return sum(difference == 0 for difference in self.differences)


@dataclass(frozen=True)
class Comparisons:
    """Every method against the reference. unit: what a pair is, "task" or "seed"."""

    reference: str
    unit: str
    rows: tuple[PairedTest, ...]


def compare_with(reference: str, rows: Iterable[RunRow], cells: Sequence[Cell]) -> Comparisons:
    """Test each method against one of them.

    A pair is a task (means over the seeds both have finished) where there are six tasks at least; with fewer, a seed
    (means over the tasks both have finished with it). Six pairs are given to Wilcoxon's signed-rank test, three to
    five to the paired t-test, fewer to none.
    """
    values = {
        (row.method, (row.backbone, row.dataset), row.seed): row.accuracy
        for row in rows
        if row.stage == "final" and row.status == "finished" and row.accuracy is not None
    }
    tasks, labels = tasks_of(cells), list(dict.fromkeys(cell.variant.label for cell in cells))
    seeds = list(dict.fromkeys(seed for _, _, seed in values))
    unit = "task" if len(tasks) >= LEAST_WILCOXON else "seed"
    found = []
    for label in labels:
        if label == reference:
            continue
        shared = {(t, s) for t in tasks for s in seeds if (label, t, s) in values and (reference, t, s) in values}
        if unit == "task":
            groups = [[pair for pair in shared if pair[0] == task] for task in tasks]
        else:
            common = [t for t in tasks if any(pair[0] == t for pair in shared)]
            groups = [[(t, s) for t in common] for s in seeds if all((t, s) in shared for t in common)]
        differences = tuple(_difference(values, label, reference, group) for group in groups if group)
        test, p = paired_p(differences)
        found.append(PairedTest(label, differences, test, p))
    adjusted = holm({test.label: test.p for test in found if test.p is not None})
    return Comparisons(
        reference,
        unit,
        tuple(PairedTest(t.label, t.differences, t.test, t.p, adjusted.get(t.label)) for t in found),
    )


def _difference(values: Mapping, label: str, reference: str, group: Sequence[tuple[Task, int]]) -> float:
    own, other = (statistics.fmean(values[name, *pair] for pair in sorted(group)) for name in (label, reference))
    return round(own - other, 12)  # equal accuracies are a tie, whatever the order of their sum


def paired_p(differences: Sequence[float]) -> tuple[str, float | None]:
    """(name of the test, two-sided p) that the differences are centred on zero; p is None for too few of them."""
    from scipy.stats import ttest_1samp, wilcoxon

    if len(differences) < LEAST_T:
        return "too few runs", None
    if not any(differences):
        return "all equal", 1.0
    if len(differences) >= LEAST_WILCOXON:
        return "Wilcoxon", float(wilcoxon(differences).pvalue)
    if len(set(differences)) == 1:
        return "no spread", None
    return "paired t", float(ttest_1samp(differences, 0.0).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number (Holm): the smallest times k, the next times k - 1, ..., never falling, at
    most 1."""
    adjusted, highest = {}, 0.0
    for index, name in enumerate(sorted(values, key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - index) * values[name]))
        adjusted[name] = highest
    return adjusted


def tasks_of(cells: Iterable[Cell]) -> list[Task]:
    """(backbone, dataset) pairs in the study's order."""
    return list(dict.fromkeys((cell.backbone, cell.dataset) for cell in cells))
