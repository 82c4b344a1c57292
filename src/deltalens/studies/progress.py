"""How far a study is: a line for every run that is done, and how long the others may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from deltalens.studies.candidates import values_text
from deltalens.studies.grid import Grid
from deltalens.studies.main_metrics import score
from deltalens.studies.results import seconds_text
from deltalens.studies.trial import Run


class Progress:
    """Shows a line for each run that gets done, whoever does it.

    An open run is taken to last as long as the finished ones most like it; `workers` runs are done at a time.
    """

    def __init__(self, grid: Grid, runs: Sequence[Run], workers: int = 1, show: Callable[[str], None] = print):
        self.grid, self.runs, self.workers, self.show = grid, runs, workers, show
        self.started = time.monotonic()
        self.open = [run for run in runs if grid.state(run) == "open"]
        self.seconds: dict[tuple[str, ...], list[float]] = {}
        opened = {run.folder for run in self.open}
        for run in grid.runs():
            if run.folder not in opened:
                self._remember(run)

    def look(self) -> None:
        """Show what has been done since the last look."""
        places = {run.folder: number for number, run in enumerate(self.runs, 1)}
        for run in list(self.open):
            if self.grid.state(run) != "open":
                self.open.remove(run)
                self._remember(run)
                place = f"[{places[run.folder]:>{len(str(len(self.runs)))}}/{len(self.runs)}]"
                self.show(f"{place} {run.describe()}: {outcome_text(self.grid, run)} | {self._time_text()}")

    def left(self) -> float | None:
        """Seconds that the open runs will take; None where no run is finished to tell by."""
        if not self.seconds:
            return None
        expected = [self._expected(run) for run in self.open]
        return max(sum(expected) / self.workers, max(expected, default=0.0))

    def _remember(self, run: Run) -> None:
        results = run.results()
        if results and "trained_in" not in results:
            for kind in (run.cell, run.cell[:2], ()):
                self.seconds.setdefault(kind, []).append(results["seconds"]["total"])

    def _expected(self, run: Run) -> float:
        if run.stage == "final" and self.grid.searches[run.cell] and run.seed == self.grid.study.seeds[0]:
            return 0.0  # its training is one of the searches
        known = next((self.seconds[kind] for kind in (run.cell, run.cell[:2], ()) if kind in self.seconds), [0.0])
        return sum(known) / len(known)

    def _time_text(self) -> str:
        left = self.left() if self.open else None
        elapsed = duration_text(time.monotonic() - self.started)
        return elapsed if left is None else f"{elapsed}, about {duration_text(left)} left"


def outcome_text(grid: Grid, run: Run) -> str:
    """What came out of a run: its accuracy, the chosen values and the time, or why it failed."""
    if grid.state(run) == "failed":
        return f"failed: {run.failure()}"
    results = run.results()
    part = "test" if results["test"] else "val"
    candidate = None if run.stage == "search" else grid.chosen(run.cell)
    chosen = "" if candidate is None else f", {values_text(candidate.shown)}"
    value = score(results[part], results.get("main_metric"))
    return f"{part} {100 * value:.1f} %{chosen}, {seconds_text(results['seconds']['total'])}"


def duration_text(seconds: float) -> str:
    """42 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
