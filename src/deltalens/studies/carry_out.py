"""Carries out runs of a study: what one worker does, whether it is alone or one of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from deltalens.studies import attempts
from deltalens.studies.attempts import Worker
from deltalens.studies.grid import Grid
from deltalens.studies.locks import RunLocks
from deltalens.studies.trial import Run, Workplace

WAIT = 0.5  # seconds between two looks at runs that others hold


def work(
    grid: Grid,
    workplace: Workplace,
    runs: Sequence[Run],
    *,
    worker: Worker | None = None,
    after: Callable[[], None] = lambda: None,
    waiting: Callable[[int], None] = lambda count: None,
) -> None:
    """Do these runs until none is left: always the first that is to be done, that can be done yet, and that nobody
    else does. A failed run is recorded and passed over.

    Any number of processes may do this with the same output folder at the same time. Each ends when all runs are
    finished or failed, so that what a killed one leaves is done by another. worker: who this is, where there are
    several. after: called when a run was done. waiting: called while others do all that is left, with its number.
    """
    locks, left = RunLocks(grid.output), list(runs)
    while left:
        for run in left:
            if not can_be_done(grid, run):
                continue
            with locks.hold(run) as held:
                done = held and _do(grid, workplace, run, worker)
            if held:
                left.remove(run)
                if done:
                    after()
                break
        else:
            waiting(len(left))
            time.sleep(WAIT)


def reopen(grid: Grid, runs: Sequence[Run]) -> None:
    """Forget the failures of runs, so that they are tried again. One that somebody works on is left to them."""
    locks = RunLocks(grid.output)
    for run in runs:
        if grid.state(run) != "failed":
            continue
        with locks.hold(run) as held:
            if held and grid.state(run) == "failed":
                run.forget_failure()
                attempts.end(run)
                run.output.checkpoint.unlink(missing_ok=True)


def is_due(grid: Grid, run: Run) -> bool:
    """Whether a run is to be done: it is open, or it was finished with another rate than its searches now say."""
    if run.failure() is not None:
        return False
    results = run.results()
    return results is None or _is_stale(results, _rate(grid, run))


def can_be_done(grid: Grid, run: Run) -> bool:
    """Whether all is there that a run needs: a final run needs the searches of its cell."""
    return run.stage == "search" or all(grid.state(search) != "open" for search in grid.searches[run.cell])


def _rate(grid: Grid, run: Run) -> float | None:
    return run.rate if run.stage == "search" else grid.chosen_rate(run.cell)


def _is_stale(results: dict[str, Any], rate: float | None) -> bool:
    return results["settings"]["lr"] != rate


def _do(grid: Grid, workplace: Workplace, run: Run, worker: Worker | None) -> bool:
    """Do a run, whose lock is held, where it is to be done. Whether it was."""
    if not is_due(grid, run):
        _tidy(grid, run)
        return False
    refused = attempts.begin(run, worker)
    try:
        if refused is not None:
            raise RuntimeError(refused)
        _train(grid, workplace, run)
    except Exception as error:  # whatever goes wrong in one run, the others are done
        run.note_failure(error)
    finally:
        attempts.end(run)
    _tidy(grid, run)
    return True


def _train(grid: Grid, workplace: Workplace, run: Run) -> None:
    rate, results = _rate(grid, run), run.results()
    if rate is None:
        reasons = "; ".join(dict.fromkeys(each.failure() or "" for each in grid.searches[run.cell]))
        raise RuntimeError(f"every learning rate failed: {reasons}")
    earlier = run.output.read_config() or {}
    trained = next((each for each in grid.searches[run.cell] if each.rate == rate), None)
    same_training = trained is not None and run.seed == trained.seed and not run.joined
    if run.stage == "final" and same_training and trained.has_adapter():
        workplace.test_trained(run, trained, rate)
    else:
        stale = results is not None and _is_stale(results, rate)
        workplace.train(run, rate, again=stale or earlier.get("lr", rate) != rate)


def _tidy(grid: Grid, run: Run) -> None:
    """Drop what nobody will ask for: notes of what was done before a kill, adapters of final runs where the study does
    not keep them, and those of searches once the final run is there that takes one of them over."""
    if not run.output.finished:
        return
    attempts.end(run)
    if run.stage == "final":
        if not grid.study.keep_adapters:
            run.drop_adapter()
        if grid.finals[run.cell][0].output.finished:
            for search in grid.searches[run.cell]:
                search.drop_adapter()
