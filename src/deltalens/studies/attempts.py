"""Runs that kill the process they are trained in: found out, and given up after the second time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.trial import Run

ATTEMPT = "attempt.json"
DEATHS = 2  # of workers, before a run is given up


@dataclass(frozen=True)
class Worker:
    """One of several processes that carry out a study together. session: the same for all of them, and for those that
    replace the dead ones."""

    session: str
    name: str


def begin(run: Run, worker: Worker | None) -> str | None:
    """Note in the run's folder that a worker begins it; the caller holds the run's lock. Why it must not, or None.

    A note that is found there is of a worker that ended without taking it back. If it is of the same session, which
    goes on, that worker has died by itself, and its death counts. Of another session nothing is known: somebody may
    have stopped it. worker: None for a process that is alone; its death ends the study, and does not count.
    """
    earlier = _read(run)
    deaths = earlier.get("deaths", 0)
    if worker is not None and earlier.get("session") == worker.session:
        deaths += 1
    if deaths >= DEATHS:
        end(run)
        return f"it killed the process that trained it {deaths} times; memory may be too small for it"
    session = None if worker is None else worker.session
    if worker is not None or deaths:
        note = {"session": session, "worker": worker and worker.name, "deaths": deaths}
        write_text(_file(run), json.dumps(note) + "\n")
    return None


def end(run: Run) -> None:
    """Take the note back: the run was done, or failed, or was stopped in good order."""
    _file(run).unlink(missing_ok=True)


def begun_by(run: Run, worker: Worker) -> bool:
    """Whether the note of a run is this worker's."""
    return _read(run).get("worker") == worker.name


def _read(run: Run) -> dict:
    try:
        return json.loads(_file(run).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _file(run: Run) -> Path:
    return run.folder / ATTEMPT
