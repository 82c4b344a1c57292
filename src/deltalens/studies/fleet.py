"""Carries out a study: here, or by several workers at a time that share its output folder."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from deltalens.studies import attempts
from deltalens.studies.attempts import Worker
from deltalens.studies.benchmarks import threads
from deltalens.studies.carry_out import reopen, work
from deltalens.studies.grid import Grid
from deltalens.studies.progress import Progress
from deltalens.studies.selection import matching, with_searches
from deltalens.studies.study import Study
from deltalens.studies.trial import MakeBackbone, Run, Workplace
from deltalens.training.loaders import default_workers
from deltalens.training.output import is_main_process

LOOK = 1.0  # seconds between two looks at what the workers have done


@dataclass(frozen=True)
class Job:
    """What a worker is told; it can be pickled.

    only: words that choose runs (see `matching`). threads: of the processor for each worker, None for torch's choice.
    loader_workers: for each worker, None for a number by its cores. The others as `Workplace` takes them.
    """

    study: Study
    output: Path
    make_backbone: MakeBackbone
    only: tuple[str, ...] = ()
    threads: int | None = None
    loader_workers: int | None = None
    accelerator: str = "auto"
    features: str | None = None

    def grid(self) -> Grid:
        return Grid(self.study, self.output)

    def workplace(self) -> Workplace:
        loaders = default_workers() if self.loader_workers is None else self.loader_workers
        return Workplace(self.study, self.make_backbone, loaders, self.accelerator, self.features)

    def sharing(self, threads: int, cores: int) -> Job:
        """For a worker that gets this part of a machine, where nothing else was asked for."""
        loaders = default_workers(cores) if self.loader_workers is None else self.loader_workers
        return replace(self, threads=self.threads or max(1, threads), loader_workers=loaders)

    def runs(self, grid: Grid) -> list[Run]:
        """The runs that were asked for, and the searches that they need."""
        return with_searches(grid, matching(grid, self.only))

    def carry_out(self, worker: Worker) -> None:
        """Be one of several workers: do runs until none is left. Each run is a training of one process, whatever part
        of a SLURM job the process is in; Lightning would join them."""
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                del os.environ[name]
        grid = self.grid()
        with threads(self.threads):
            work(grid, self.workplace(), self.runs(grid), worker=worker)


class Crew(Protocol):
    """Several processes, here or elsewhere, each of which calls `job.carry_out`. All end when the context does."""

    def __enter__(self) -> Crew: ...

    def __exit__(self, *error: object) -> None: ...

    def start(self, worker: Worker, place: int) -> None:
        """Start a worker. place: 0, 1, 2...: of those at work at the same time each has its own."""

    def ended(self, seconds: float) -> dict[Worker, str | None]:
        """Wait for that long at most until a worker ends. Those that have ended: None, or how one died."""


def run_study(
    job: Job,
    crew: Crew | None = None,
    parallel: int = 1,
    *,
    retry_failed: bool = False,
    show: Callable[[str], None] = print,
) -> None:
    """Do every run that was asked for and is not finished. A failed one is recorded and passed over, and tried again
    only with retry_failed.

    crew: who does it, `parallel` at a time; None for this process. Other processes may be at work in the same folder.
    show: gets a line for each run done.

    Raises what makes all runs impossible: a missing folder of images, an unknown backbone; ValueError in a process that
    is not the first of its job; RuntimeError where workers die before they have begun a run.
    """
    if not is_main_process():
        raise ValueError(
            "compare was started as one of several ranks (torchrun, srun): start single processes (a job array); "
            "those with the same --output share the work"
        )
    grid = job.grid()
    grid.check_unchanged()
    runs = job.runs(grid)
    if retry_failed:
        reopen(grid, matching(grid, job.only))
    workplace = job.workplace()
    workplace.check([run for run in runs if grid.state(run) == "open"])
    due = [run for run in runs if grid.state(run) == "open"]
    if crew is not None and due:
        count = min(parallel, len(due))
        progress = Progress(grid, runs, count, show)
        with crew:
            _supervise(grid, crew, count, runs, progress)
        return
    progress = Progress(grid, runs, show=show)
    told: list[int] = []

    def waiting(count: int) -> None:
        progress.look()
        if not told:
            told.append(count)
            show(f"other processes do the last {count} runs; waiting for them")

    with threads(job.threads):
        work(grid, workplace, runs, after=progress.look, waiting=waiting)
    progress.look()


def _supervise(grid: Grid, crew: Crew, count: int, runs: Sequence[Run], progress: Progress) -> None:
    """Start `count` workers, and others for those that die, until all have found nothing left to do."""
    session, started, lost, pause = uuid.uuid4().hex, 0, 0, LOOK
    places: dict[Worker, int] = {}

    def start(place: int) -> None:
        nonlocal started
        started += 1
        worker = Worker(session, f"{session}-{started}")
        crew.start(worker, place)
        places[worker] = place

    for place in range(count):
        start(place)
    while places:
        for worker, death in crew.ended(pause).items():
            place = places.pop(worker)
            if death is None:
                continue
            run = next((run for run in runs if attempts.begun_by(run, worker)), None)
            progress.show(f"a worker died ({death}){f' in {run.describe()}' if run else ''}")
            lost += run is None
            if lost > count:
                raise RuntimeError(
                    f"workers die before they begin a run, the last one {death}; the same command goes on"
                )
            start(place)
        began = time.monotonic()
        progress.look()
        pause = max(LOOK, 10 * (time.monotonic() - began))  # looking at many runs on a slow disk takes time
