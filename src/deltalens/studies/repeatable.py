"""What makes a search with optuna go on after a kill as if nothing had happened: draws and verdicts that depend on what
the database holds for certain, and on nothing that was going on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from deltalens.training.loaders import mixed_seed


class DrawByName(optuna.samplers.BaseSampler):
    """Every value of a trial is drawn by a sampler of its own, whose seed comes from (seed, trial, name): a trial that
    was killed between two draws gets the same values as any other.

    make: seed -> sampler of one value, of which `sample_independent` is used.
    """

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int):
        self.make, self.seed = make, seed

    def infer_relative_search_space(self, study, trial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study, trial, search_space) -> dict[str, Any]:
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        seed = mixed_seed(self.seed, trial.number, zlib.crc32(param_name.encode())) % 2**32
        return self.make(seed).sample_independent(study, trial, param_name, param_distribution)


class Judge:
    """Says whether a trial is to end early, from the values of all trials so far.

    Successive halving marks a trial in the study before it says that it ends. A trial killed in between would be past
    that mark, and go on. So the pruner works on a copy in memory, in which the values are played again.
    """

    def __init__(self, pruner: optuna.pruners.BasePruner, earlier: Iterable[FrozenTrial]):
        self._copy = optuna.create_study(
            direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0)
        )
        for trial in earlier:
            self.begin({})
            for epoch, value in sorted(trial.intermediate_values.items()):
                self.ends(epoch, value)
            self.finish(trial.state, trial.value)

    def begin(self, known: Mapping[int, float]) -> None:
        """A trial begins, or goes on. known: epoch -> value that it has reported already."""
        self._trial, self._known = self._copy.ask(), dict(known)

    def ends(self, epoch: int, value: float) -> bool:
        """Whether the trial ends with this epoch, for its value."""
        self._play_again(epoch)
        self._known.pop(epoch, None)
        return self._verdict(epoch, value)

    def finish(self, state: TrialState, value: float | None) -> None:
        """The trial is over. value: of a complete one."""
        self._play_again()
        complete = state == TrialState.COMPLETE
        self._copy.tell(self._trial, value if complete else None, None if complete else state)

    def _play_again(self, until: float = math.inf) -> None:
        for epoch in sorted(step for step in self._known if step < until):
            self._verdict(epoch, self._known.pop(epoch))

    def _verdict(self, epoch: int, value: float) -> bool:
        self._trial.report(value, epoch)
        return self._trial.should_prune()
