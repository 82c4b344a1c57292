"""The folder a run writes to: whether it may, and what it leaves there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deltalens.lifecycle.atomic import is_leftover, remove_leftovers, write_text

CONFIG, CHECKPOINT, METRICS, RESULTS = "config.yaml", "last.ckpt", "metrics.csv", "results.json"
REPORT = "report.html"  # of dense tasks
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")


class Output:
    """OUTPUT of a run: the adapter's two files and card, `config.yaml`, `metrics.csv`, `results.json`, and
    `last.ckpt` while training goes on. All are written to a temporary name and renamed; `results.json` is last and
    marks a finished run."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config, self.checkpoint = self.folder / CONFIG, self.folder / CHECKPOINT
        self.metrics, self.results = self.folder / METRICS, self.folder / RESULTS

    @property
    def finished(self) -> bool:
        return self.results.is_file()

    def check(self, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse, before anything slow is done, what must not be written over.

        A finished run is refused unless overwrite or resume; an unfinished one unless either says what to do with it;
        a folder with other files unless overwrite. Raises FileExistsError, NotADirectoryError where a file is in the
        way, ValueError for both flags.
        """
        if resume and overwrite:
            raise ValueError("--resume continues a run and --overwrite discards it: pass one of them")
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; the output must be a folder")
        files = list(self.folder.iterdir()) if self.folder.is_dir() else []
        present = sorted(path.name for path in files if not is_leftover(path))
        if not present or resume or overwrite:
            return
        if self.finished:
            raise FileExistsError(f"{self.folder} holds a finished run; pass --overwrite, or another --output")
        if self.checkpoint.is_file() or self.config.is_file():
            raise FileExistsError(f"{self.folder} holds an unfinished run; pass --resume to go on, or --overwrite")
        raise FileExistsError(
            f"{self.folder} is not empty ({', '.join(present[:5])}); pass --overwrite, or another --output"
        )

    def prepare(self, resume: bool = False, overwrite: bool = False) -> None:
        """`check`, then make the folder ready. overwrite removes the files of the earlier run, and nothing else."""
        self.check(resume, overwrite)
        if overwrite:
            for name in (
                RESULTS,
                CHECKPOINT,
                CONFIG,
                METRICS,
                REPORT,
                *ADAPTER,
            ):  # results first: no half-removed finished run
                (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a killed run has left: temporary files, and the checkpoint of a finished run."""
        remove_leftovers(self.folder)
        if self.finished:
            self.checkpoint.unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml: the options that give this run again."""
        import yaml

        write_text(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def read_config(self) -> dict[str, Any] | None:
        """What config.yaml holds, or None where there is none."""
        import yaml

        try:
            return yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:  # also where another process begins the run anew just now
            return None

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json and drop the checkpoint, which a finished run does not need."""
        write_text(self.results, json.dumps(results, indent=2) + "\n")
        self.tidy()

    def read_results(self) -> dict[str, Any]:
        return json.loads(self.results.read_text(encoding="utf-8"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files, as torchrun, SLURM and Lightning's own launcher say."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    return int(rank) == 0
