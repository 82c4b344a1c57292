"""What papers report of VTAB-1k: group means, wins over full fine-tuning, and parameters of all tasks together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltalens.data.vtab1k import GROUPS, TASKS


@dataclass(frozen=True)
class VTABSummary:
    """groups: group -> mean of its tasks. tasks: group -> how many of them are there. wins: group -> tasks on which the
    method is better than full fine-tuning, where that is known."""

    groups: dict[str, float]
    tasks: dict[str, int]
    mean: float
    mean_of_groups: float
    wins: dict[str, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether all 19 tasks are in."""
        return sum(self.tasks.values()) == len(TASKS)


def vtab_summary(accuracies: Mapping[str, float], full: Mapping[str, float] | None = None) -> VTABSummary:
    """Summarise accuracies of VTAB-1k tasks (task -> number). full: those of full fine-tuning, for the wins; an equal
    number is no win.

    mean is over tasks, mean_of_groups over the means of the groups that are there: for 19 tasks in groups of 7, 4
    and 8 they differ, and papers report both. Raises ValueError for names that are no tasks and for no task at all.
    """
    unknown = sorted(accuracies.keys() - TASKS.keys())
    if unknown or not accuracies:
        raise ValueError(f"no task of VTAB-1k: {', '.join(unknown)}" if unknown else "there are no tasks to summarise")
    members = {group: [task for task in accuracies if TASKS[task].group == group] for group in GROUPS}
    members = {group: tasks for group, tasks in members.items() if tasks}
    groups = {group: statistics.fmean(accuracies[task] for task in tasks) for group, tasks in members.items()}
    wins = None
    if full is not None and accuracies.keys() <= full.keys():
        wins = {group: sum(accuracies[task] > full[task] for task in tasks) for group, tasks in members.items()}
    return VTABSummary(
        groups=groups,
        tasks={group: len(tasks) for group, tasks in members.items()},
        mean=statistics.fmean(accuracies.values()),
        mean_of_groups=statistics.fmean(groups.values()),
        wins=wins,
    )


def total_parameters(backbone: int, adapters: Sequence[int], heads: Sequence[int]) -> float:
    """How many backbones all tasks together take to store: (backbone + sum of adapters and heads) / backbone.

    adapters, heads: trained parameters of each task. A method that trains the whole backbone for a task needs no copy
    of the pretrained one for it; where all do, that is left out of the sum.
    """
    shared = 0 if adapters and min(adapters) >= backbone else backbone
    return (shared + sum(adapters) + sum(heads)) / backbone
