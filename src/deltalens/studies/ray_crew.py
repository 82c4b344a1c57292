"""Workers of a study as tasks of Ray, on this machine or on many that share a disk."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalens.studies.attempts import Worker
    from deltalens.studies.fleet import Job


class RayCrew:
    """Tasks of Ray, each a worker that does runs until none is left.

    address: "local" starts Ray here; "auto" and others join a cluster that is there, whose machines must see the same
    folders by the same names, and have the same deltalens. `parallel` tasks share the processors, and the GPUs where
    there are any: a GPU each, or a part of one where they are fewer.
    """

    def __init__(self, job: Job, parallel: int, address: str):
        self.job, self.parallel, self.address = job, parallel, address
        self.tasks: dict[Worker, Any] = {}
        self.ray = import_ray()

    def __enter__(self) -> RayCrew:
        self.own = not self.ray.is_initialized()
        if self.own:
            self._connect()
        total = self.ray.cluster_resources()
        cores = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        cpus = self.job.threads or cpus_each(cores, self.parallel)
        if cpus > max(cores):
            raise ValueError(f"--threads {cpus} are more than the {max(cores)} CPUs of the largest machine of Ray")
        gpus = gpus_each(total.get("GPU", 0), self.parallel) if self.job.accelerator in ("auto", "gpu") else 0
        self.job = self.job.sharing(cpus, cpus)
        self.task = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_be)
        return self

    def _connect(self) -> None:
        local = self.address == "local"
        address = os.environ.get("RAY_ADDRESS") or "auto" if self.address == "auto" else self.address
        path = os.environ.get("PYTHONPATH")
        options: dict[str, Any] = {"include_dashboard": False} if local else {}
        if path and not local:  # here workers get it anyway
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
        try:
            _knock(address)
            self.ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:  # Ray raises bare ones, too
            reason = str(error).strip().splitlines()[0]
            if local:
                raise ConnectionError(f"Ray does not start here: {reason}") from error
            raise ConnectionError(
                f"there is no cluster for --ray {address}: {reason} "
                "(ray start --head starts one; --ray local needs none)"
            ) from error

    def __exit__(self, *error: object) -> None:
        for task in self.tasks.values():
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.cancel(task, force=True)
        self.tasks.clear()
        if self.own:
            self.ray.shutdown()

    def start(self, worker: Worker, place: int) -> None:
        self.tasks[worker] = self.task.remote(self.job, worker, os.getcwd())

    def ended(self, seconds: float) -> dict[Worker, str | None]:
        self.ray.wait(list(self.tasks.values()), num_returns=1, timeout=seconds)
        ready = set(self.ray.wait(list(self.tasks.values()), num_returns=len(self.tasks), timeout=0)[0])
        found = {}
        for worker, task in list(self.tasks.items()):
            if task in ready:
                del self.tasks[worker]
                found[worker] = self._death(task)
        return found

    def _death(self, task: Any) -> str | None:
        try:
            self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            return f"{type(error.cause).__name__}: {error.cause}"
        except self.ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[0]
        return None


def import_ray() -> Any:
    """The package ray, without its reports of use, and without its hook for `uv run`, which would send the folder we
    are in to every worker, and start them with another Python.

    Raises ValueError where it is not installed.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            'the package ray is not installed: pip install "deltalens[ray]", or use --parallel alone on this machine'
        ) from None
    return ray


def _knock(address: str) -> None:
    """OSError where nobody answers at HOST:PORT; Ray itself would wait for minutes."""
    place = re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address)
    if place:
        socket.create_connection((place[1], int(place[2])), timeout=10).close()


def cpus_each(cores: list[int], parallel: int) -> int:
    """The most CPUs that each of so many tasks can have on machines with these cores; 1 where there are too many."""
    fitting = (each for each in range(max(cores), 1, -1) if sum(of // each for of in cores) >= parallel)
    return next(fitting, 1)


def gpus_each(gpus: float, parallel: int) -> float:
    """GPUs for each of so many tasks: one, a half, a third..., or none where there is none."""
    return 1 / math.ceil(parallel / gpus) if gpus else 0


def _be(job: Job, worker: Worker, folder: str) -> None:
    os.chdir(folder)  # the study's folders may be named from where the command was given
    job.carry_out(worker)
