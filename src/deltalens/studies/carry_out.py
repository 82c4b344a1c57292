"""Carries out runs of a study: what one worker does, whether it is alone or one of many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
    for run in [run for run in runs if grid.state(run) == "failed"]:  # all of them before the first is open again
        with locks.hold(run) as held:
            if held and run.failure() is not None:
                attempts.end(run)
                run.output.checkpoint.unlink(missing_ok=True)
                run.forget_failure()  # last: a run that is open goes on from its checkpoint


def can_be_done(grid: Grid, run: Run) -> bool:
    """Whether all is there that a run needs: a final run needs the searches of its cell."""
    return run.stage == "search" or all(grid.state(search) != "open" for search in grid.searches[run.cell])


def _do(grid: Grid, workplace: Workplace, run: Run, worker: Worker | None) -> bool:
    """Do a run, whose lock is held, where it is to be done. Whether it was."""
    if grid.state(run) == "failed":
        return False
    if grid.state(run) == "finished":
        _tidy(grid, run)
        return False
    candidate = run.candidate if run.stage == "search" else grid.chosen(run.cell)
    refused = attempts.begin(run, worker)
    try:
        if refused is not None:
            raise RuntimeError(refused)
        if candidate is None:
            reasons = "; ".join(dict.fromkeys(each.failure() or "" for each in grid.searches[run.cell]))
            raise RuntimeError(f"every trial of the search failed: {reasons}")
        run.forget_failure()  # of other values
        trained = grid.search_of(run, candidate)
        if trained is not None and trained.has_adapter():
            workplace.test_trained(run, trained)
        else:
            workplace.train(run, candidate.values, again=not run.goes_on_with(candidate.values))
    except Exception as error:  # whatever goes wrong in one run, the others are done
        run.note_failure(error, candidate)
    else:
        _tidy(grid, run)
    finally:
        attempts.end(run)
    return True


def _tidy(grid: Grid, run: Run) -> None:
    """Drop what nobody will ask for: what a kill has left of a finished run, adapters of final runs where the study
    does not keep them, and those of searches once the final run is there that takes one of them over."""
    run.output.tidy()
    attempts.end(run)
    if run.stage == "final":
        if not grid.study.keep_adapters:
            run.drop_adapter()
        if grid.finals[run.cell][0].output.finished:
            for search in grid.searches[run.cell]:
                search.drop_adapter()
