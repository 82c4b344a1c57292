"""Workers of a study as processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltalens.studies.attempts import Worker
    from deltalens.studies.fleet import Job

GROUPS = hasattr(os, "setpgid")  # process groups; Windows has none
IMPORTED = ["deltalens.studies.fleet", "lightning.pytorch"]


class LocalCrew:
    """Processes that start anew, not as copies of this one. gpus: what CUDA calls the GPUs that they are dealt, in
    turns; none where there is nothing to deal.

    They end when the context does, and when this process is killed; the processes that they have started too.
    """

    def __init__(self, job: Job, gpus: Sequence[str] = ()):
        self.job, self.gpus = job, gpus
        # On Linux one clean process imports torch once for all, and workers are copies of that one.
        self.context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self.context.set_forkserver_preload(IMPORTED)
        self.processes: dict[Worker, BaseProcess] = {}

    def __enter__(self) -> LocalCrew:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            _kill(process)
        for process in self.processes.values():
            process.join()
        self.processes.clear()

    def start(self, worker: Worker, place: int) -> None:
        gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
        process = self.context.Process(target=_be, args=(self.job, worker, gpu))
        with _no_interrupts():  # one that arrives meanwhile is raised behind this, when the process is known
            process.start()
            self.processes[worker] = process

    def ended(self, seconds: float) -> dict[Worker, str | None]:
        wait([process.sentinel for process in self.processes.values()], timeout=seconds)
        found = {}
        for worker, process in list(self.processes.items()):
            if process.is_alive():
                continue
            del self.processes[worker]
            _kill_group(process.pid)
            found[worker] = _death(process.exitcode)
        return found


def visible_gpus() -> list[str]:
    """The GPUs of this machine that CUDA may use, by the names that CUDA_VISIBLE_DEVICES takes; none but one is none
    to deal."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


# ------------------------------------------------------------------ inside a worker
def _be(job: Job, worker: Worker, gpu: str | None) -> None:
    if GROUPS:
        os.setpgid(0, 0)  # with the processes that it will start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    job.carry_out(worker)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    if GROUPS:
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


# ------------------------------------------------------------------ from outside
@contextlib.contextmanager
def _no_interrupts():
    """Processes started meanwhile never see Ctrl-C: it is for this one, which then ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: BaseProcess) -> None:
    """A kill does no harm: a study goes on from any point. A process that still starts has no group yet."""
    _kill_group(process.pid)
    process.kill()


def _kill_group(pid: int) -> None:
    if GROUPS:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _death(code: int) -> str | None:
    if code == 0:
        return None
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"
