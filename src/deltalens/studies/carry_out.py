"""Carries out the runs of a study, and says how long they may yet take."""

from __future__ import annotations

import time
from collections.abc import Callable

from deltalens.studies.candidates import values_text
from deltalens.studies.grid import Grid
from deltalens.studies.results import seconds_text
from deltalens.studies.trial import Run, Workplace, score


def run_grid(
    grid: Grid, workplace: Workplace, *, retry_failed: bool = False, show: Callable[[str], None] = print
) -> None:
    """Do every run that is not finished. A failed one is recorded and passed over, and tried again only with
    retry_failed. show: gets a line for each run done.

    Raises what makes all runs impossible: a missing folder of images, an unknown backbone.
    """
    grid.check_unchanged()
    runs = list(grid.runs())
    if retry_failed:
        for run in [run for run in runs if grid.state(run) == "failed"]:  # all of them before the first is open again
            run.output.checkpoint.unlink(missing_ok=True)
            run.forget_failure()  # last: a run that is open goes on from its checkpoint
    workplace.check([run for run in runs if grid.state(run) == "open"])
    clock = Clock(grid, runs)
    for number, run in enumerate(runs, 1):
        outcome = _do(grid, workplace, run)
        if outcome:
            clock.note(run)
            show(f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.describe()}: {outcome} | {clock.text()}")


def _do(grid: Grid, workplace: Workplace, run: Run) -> str | None:
    """Do a run where it is to be done. What came out, or None where there was nothing to do."""
    if grid.state(run) == "failed":
        return None
    if grid.state(run) == "finished":
        _tidy(grid, run)
        return None
    candidate = run.candidate if run.stage == "search" else grid.chosen(run.cell)
    try:
        if candidate is None:
            reasons = "; ".join(dict.fromkeys(each.failure() or "" for each in grid.searches[run.cell]))
            raise RuntimeError(f"every trial of the search failed: {reasons}")
        run.forget_failure()  # of other values
        trained = grid.search_of(run, candidate)
        if trained is not None and trained.has_adapter():
            results = workplace.test_trained(run, trained)
        else:
            results = workplace.train(run, candidate.values, again=not run.goes_on_with(candidate.values))
    except Exception as error:  # whatever goes wrong in one run, the others are done
        run.note_failure(error, candidate)
        return f"failed: {run.failure()}"
    _tidy(grid, run)
    part = "test" if results["test"] else "val"
    chosen = "" if run.stage == "search" else f", {values_text(candidate.shown)}"
    return f"{part} {100 * score(results[part]):.1f} %{chosen}, {seconds_text(results['seconds']['total'])}"


def _tidy(grid: Grid, run: Run) -> None:
    """Drop adapters that nobody will ask for: those of searches once the first final run is there, and of final runs
    where the study does not keep them. And what a kill has left of a finished run."""
    run.output.tidy()
    if run.stage == "final":
        if not grid.study.keep_adapters:
            run.drop_adapter()
        for search in grid.searches[run.cell]:
            search.drop_adapter()


class Clock:
    """How long it has taken, and may take yet: an open run is taken to last as long as the finished ones most like
    it."""

    def __init__(self, grid: Grid, runs: list[Run]):
        self.grid, self.all, self.started = grid, runs, time.monotonic()
        self.open = {run.folder for run in runs if grid.state(run) == "open"}
        self.seconds: dict[tuple[str, ...], list[float]] = {}
        for run in runs:
            if run.folder not in self.open:
                self._remember(run)

    def note(self, run: Run) -> None:
        """A run was done."""
        self.open.discard(run.folder)
        self._remember(run)

    def _remember(self, run: Run) -> None:
        results = run.results()
        if results and "trained_in" not in results:
            for kind in (run.cell, run.cell[:2], ()):
                self.seconds.setdefault(kind, []).append(results["seconds"]["total"])

    def left(self) -> float:
        """Seconds that the open runs will take."""
        return sum(self._expected(run) for run in self.all if run.folder in self.open)

    def _expected(self, run: Run) -> float:
        if run.stage == "final" and self.grid.searches[run.cell] and run.seed == self.grid.study.seeds[0]:
            return 0.0  # its training is one of the searches
        known = next((self.seconds[kind] for kind in (run.cell, run.cell[:2], ()) if kind in self.seconds), [0.0])
        return sum(known) / len(known)

    def text(self) -> str:
        elapsed = time.monotonic() - self.started
        left = f", about {duration_text(self.left())} left" if self.open else ""
        return f"{duration_text(elapsed)}{left}"


def duration_text(seconds: float) -> str:
    """42 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
