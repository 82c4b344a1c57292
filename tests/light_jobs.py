"""Jobs for crews of workers that import nothing heavy: what happens to processes is tested without training.

As a program it is the main process of such a crew: `python light_jobs.py FOLDER`.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from deltalens.studies import local_crew


@dataclass(frozen=True)
class LightJob:
    """What a worker does is its name: end, raise, die, or sleep beside a process that it has started."""

    folder: Path
    threads: int | None = None
    accelerator: str = "auto"

    def sharing(self, threads, cores):
        return self

    def carry_out(self, worker):
        if worker == "raise":
            raise OSError("no space left")
        if worker == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if worker.startswith("sleep"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            file = self.folder / worker
            file.with_suffix(".part").write_text(f"{os.getpid()} {child.pid}")
            file.with_suffix(".part").rename(file)
            time.sleep(600)
        (self.folder / worker).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def pids(folder: Path, *workers: str) -> list[int]:
    """The processes of sleeping workers and what they have started, once they are there."""
    wait_until(lambda: all((folder / worker).is_file() for worker in workers))
    return [int(word) for worker in workers for word in (folder / worker).read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def main(folder: str) -> None:
    local_crew.IMPORTED.clear()
    with local_crew.LocalCrew(LightJob(Path(folder))) as crew:
        crew.start("sleep-0", 0)
        crew.start("sleep-1", 1)
        while True:
            crew.ended(60)


if __name__ == "__main__":
    main(sys.argv[1])
