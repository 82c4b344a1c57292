"""Locks of a study's runs: whoever works on a run holds its lock, and nobody else takes the run meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from deltalens.studies.grid import RUNS
from deltalens.studies.trial import Run

LOCKS = "locks"


class RunLocks:
    """A lock for every run of the study in `output`, for processes of one machine and of machines with a shared disk.

    The operating system holds them, so that the lock of a killed process is gone with it. Their empty files lie under
    `output`/locks, not in the runs' folders: they say nothing about a run, and a run's folder can be removed.
    """

    def __init__(self, output: Path):
        self.runs, self.locks = output / RUNS, output / LOCKS

    @contextlib.contextmanager
    def hold(self, run: Run) -> Iterator[bool]:
        """Hold the lock of a run within the context, unless somebody else does. Gives whether it is held by us.

        Raises OSError where the disk has no locks.
        """
        file = self._file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        except (NotImplementedError, OSError) as error:
            raise OSError(f"{self.locks} cannot be locked ({error}): {ADVICE}") from error
        try:
            if isinstance(lock, SoftFileLock):  # what filelock turns to without flock; it would outlive a kill
                raise OSError(f"the disk of {self.locks} has no locks: {ADVICE}")
            yield True
        finally:
            lock.release()

    def held_elsewhere(self, run: Run) -> bool:
        """Whether somebody works on a run just now."""
        if not self._file(run).is_file():
            return False
        with self.hold(run) as held:
            return not held

    def _file(self, run: Run) -> Path:
        place = self.locks / run.folder.relative_to(self.runs)
        return place.with_name(f"{place.name}.lock")


ADVICE = "name an --output on a disk with file locks (flock), on which several processes can share a study"
