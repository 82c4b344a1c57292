"""Search for the best settings of a method on the validation images, with optuna.

Every trial is a run folder. The search is kept in a database, and what trial k draws depends on the seed, k and the
trials before it only: a search that was killed goes on with the trial it was in, from that trial's last epoch, and ends
as if it had not been stopped.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltalens.lifecycle.atomic import remove_leftovers, write_text
from deltalens.studies.search_space import SearchSpace, Value
from deltalens.training import fit
from deltalens.training.output import ADAPTER, Output

if TYPE_CHECKING:
    import optuna

    from deltalens.studies.repeatable import Judge

# values of a trial -> (task, data without test, settings, configuration to write)
BuildRun = Callable[[Mapping[str, Value]], tuple[Any, Any, Any, dict[str, Any]]]
Pruning = Literal["none", "median", "halving"]
DATABASE = "search.db"


@dataclass(frozen=True)
class TrialRecord:
    """What came of one trial. state: "done", "pruned", "failed" or "open". value: the metric of its last epoch."""

    number: int
    state: str
    value: float | None
    values: Mapping[str, Value]
    epochs: int
    failure: str | None = None


class Search:
    """A search in a folder.

    space: what is chosen. trials: how many, counting pruned and failed ones, so that every method gets the same budget.
    metric: of the validation results, the larger the better. default_lr, batch_size: see `SearchSpace.draw`.

    A grid ends with its last point. Raises ValueError where the folder holds a search of something else, ImportError
    without optuna.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        space: SearchSpace,
        *,
        trials: int,
        metric: str = "accuracy",
        seed: int = 0,
        prune: Pruning = "median",
        default_lr: float = 1e-3,
        batch_size: int = 64,
    ):
        if trials < 1:
            raise ValueError(f"trials must be at least 1, got {trials}")
        self.folder, self.space, self.metric, self.seed, self.prune = Path(output), space, metric, seed, prune
        self.default_lr, self.batch_size = default_lr, batch_size
        self.trials = trials if space.sampler != "grid" else min(trials, space.size() or trials)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self.study = self._open()

    def run(self, build: BuildRun, show: Callable[[str], None] = lambda line: None) -> list[TrialRecord]:
        """Do what is left of the search. build: makes the run of a trial; a ValueError in it, or a loss that is not
        finite, fails that trial only."""
        from deltalens.studies.repeatable import Judge

        over = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        judge = Judge(self._pruner(), over)
        self._tidy()
        for number in range(self.trials):
            trial = self._trial(number)
            if trial is None:
                continue
            self._do(trial, build, judge)
            self._tidy()
            record = self.records()[number]
            value = "" if record.value is None else f" {self.metric} {record.value:.4f}"
            chosen = ", ".join(f"{name} {_text(each)}" for name, each in record.values.items())
            show(f"trial {number + 1}/{self.trials}: {record.state}{value} ({chosen})")
        return self.records()

    def records(self) -> list[TrialRecord]:
        """Every trial so far, in order."""
        return [_record(trial) for trial in self.study.get_trials(deepcopy=False)]

    def best(self) -> TrialRecord:
        """The finished trial with the best value; among equals the first. ValueError where none finished."""
        finished = [record for record in self.records() if record.state == "done"]
        if not finished:
            failures = {record.failure for record in self.records() if record.failure}
            raise ValueError(f"no trial finished{': ' + '; '.join(sorted(failures)) if failures else ''}")
        return max(finished, key=lambda record: (record.value, -record.number))

    def folder_of(self, record: TrialRecord) -> Path:
        return self._folder(record.number)

    # ------------------------------------------------------------------ one trial
    def _do(self, trial: optuna.Trial, build: BuildRun, judge: Judge) -> None:
        import optuna
        from optuna.trial import TrialState

        values = self.space.draw(trial, self.default_lr, self.batch_size)
        trial.set_user_attr("values", values)
        judge.begin(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def after_epoch(row: dict[str, float]) -> None:
            if f"val_{self.metric}" not in row:
                known = ", ".join(name.removeprefix("val_") for name in row if name.startswith("val_"))
                raise LookupError(f"there is no validation metric {self.metric!r}; this task has {known}")
            value, epoch = row[f"val_{self.metric}"], int(row["epoch"])
            with warnings.catch_warnings():  # a resumed trial reports its epochs a second time
                warnings.filterwarnings("ignore", ".*already reported.*")
                trial.report(value, epoch)
            trial.set_user_attr("epochs", epoch)
            if judge.ends(epoch, value):
                raise optuna.TrialPruned

        state, value = TrialState.COMPLETE, None
        try:
            task, data, settings, config = build(values)
            folder = self._folder(trial.number)
            results = fit(task, data, settings, folder, resume=True, config=config, after_epoch=after_epoch)
            value = results["val"][self.metric]
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except ValueError as error:
            trial.set_user_attr("failure", " ".join(str(error).split()))
            state = TrialState.FAIL
        self.study.tell(trial, value, None if state == TrialState.COMPLETE else state)
        judge.finish(state, value)

    def _tidy(self) -> None:
        """Remove what trials that are over have left and nobody will ask for. A trial that is open keeps everything: it
        may be trained and not yet told."""
        over = [record for record in self.records() if record.state != "open"]
        best = max((r for r in over if r.state == "done"), key=lambda r: (r.value, -r.number), default=None)
        for record in over:
            place = Output(self._folder(record.number))
            place.tidy()
            if record.state == "pruned":
                place.checkpoint.unlink(missing_ok=True)
            if record is not best:
                for name in ADAPTER:
                    (place.folder / name).unlink(missing_ok=True)

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"

    # ------------------------------------------------------------------ the search
    def _open(self) -> optuna.Study:
        try:
            import optuna
        except ImportError as error:
            raise ImportError("a search needs the package optuna: pip install deltalens[tune]") from error

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=f"sqlite:///{(self.folder / DATABASE).resolve()}",
            study_name="search",
            direction="maximize",
            sampler=self._sampler(0),
            pruner=self._pruner(),
            load_if_exists=True,
        )
        facts = {"space": repr(self.space), "metric": self.metric, "seed": self.seed, "prune": self.prune}
        for name, value in facts.items():
            earlier = study.user_attrs.get(name, value)
            if earlier != value:
                raise ValueError(
                    f"{self.folder} holds a search with another {name}: it was {earlier}, and is {value}. Take another "
                    "--output, or the same settings"
                )
            study.set_user_attr(name, value)
        return study

    def _trial(self, number: int) -> optuna.Trial | None:
        """The trial with that number, new or stopped in the middle; None where it is over."""
        import optuna

        known = self.study.get_trials(deepcopy=False)
        self.study.sampler = self._sampler(number)
        if number == len(known):
            return self.study.ask()
        return None if known[number].state.is_finished() else optuna.Trial(self.study, known[number]._trial_id)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Draws for the trial of that number."""
        import optuna

        from deltalens.studies.repeatable import DrawByName

        if self.space.sampler == "grid":
            points = self.space.points(self.seed)
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                return optuna.samplers.PartialFixedSampler(points[number], optuna.samplers.RandomSampler(seed=0))
        kind = optuna.samplers.RandomSampler if self.space.sampler == "random" else optuna.samplers.TPESampler
        return DrawByName(lambda seed: kind(seed=seed), self.seed)

    def _pruner(self) -> optuna.pruners.BasePruner:
        import optuna

        if self.prune == "none":
            return optuna.pruners.NopPruner()
        if self.prune == "halving":
            return optuna.pruners.SuccessiveHalvingPruner()
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    states = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
    facts = trial.user_attrs
    value = trial.value if trial.state.name == "COMPLETE" else last
    return TrialRecord(
        trial.number,
        states.get(trial.state.name, "open"),
        value,
        facts.get("values", trial.params),
        facts.get("epochs", 0),
        facts.get("failure"),
    )


# ------------------------------------------------------------------ what is written
def trials_table(search: Search) -> str:
    """Markdown: every trial, the best first."""
    records = sorted(search.records(), key=lambda r: (r.state != "done", -(r.value or 0), r.number))
    names = list(dict.fromkeys(name for record in records for name in record.values))
    head = ["trial", *names, search.metric, "epochs", "state"]
    rows = [
        [
            str(record.number + 1),
            *[_text(record.values.get(name, "")) for name in names],
            "" if record.value is None else f"{record.value:.4f}",
            str(record.epochs),
            record.state + (f": {record.failure}" if record.failure else ""),
        ]
        for record in records
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(search: Search) -> None:
    """trials.md and trials.csv in the search's folder."""
    write_text(search.folder / "trials.md", trials_table(search))
    records = search.records()
    names = list(dict.fromkeys(name for record in records for name in record.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", search.metric, "epochs", *names])
    for record in records:
        values = [record.values.get(name, "") for name in names]
        writer.writerow([record.number + 1, record.state, record.value, record.epochs, *values])
    write_text(search.folder / "trials.csv", text.getvalue())


def _text(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
