"""Commands that are killed with SIGKILL, and what their folders hold afterwards."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from deltalens.lifecycle.atomic import is_leftover

PRELOADED = ["kills", "deltalens.cli.train", "deltalens.cli.tune", "deltalens.cli.compare", "deltalens.training.runner"]
PRELOADED += ["deltalens.training.callbacks", "deltalens.studies.tune", "deltalens.studies.repeatable", "torchvision"]
PRELOADED += ["jsonargparse", "alembic.command", "sqlalchemy.orm", "deltalens.studies.study_report"]

COMMAND_LINE = "import sys; from deltalens.cli.main import main; sys.exit(main())"
STUDY = """\
title: Killed
backbones: {model: MODEL, label: tiny}
methods:
  SCT: {method: sct, num_channels: 6}
seeds: [0, 1]
lr: {relative: [1, 0.1]}
training: {epochs: 2, batch_size: 8, warmup_epochs: 0, min_crop: 1, hflip: 0}
"""
SPACE = """\
sampler: random
space: {lr: [1e-3, 1e-2, 1e-1], method.bottleneck: [2, 4]}
"""


@dataclass(frozen=True)
class Command:
    """A command that writes below a folder. start, again: the words, of the folder, for the first and later calls."""

    name: str
    start: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]


def commands(place: Path) -> dict[str, Command]:
    """place: holds the pictures and a tiny backbone, and gets the files of the study and of the space."""
    (place / "study.yaml").write_text(STUDY.replace("MODEL", str(place / "model")))
    (place / "space.yaml").write_text(SPACE)
    photos = str(place / "photos")
    shared = ["--model", str(place / "model"), "--data", photos, "--workers", "0", "--accelerator", "cpu"]
    shared += ["--epochs", "2", "--batch-size", "8"]
    methods = ["--method", "sct", "--method.num_channels", "6", "--method", "lora", "--method.dropout", "0.3"]

    def train(folder: Path) -> list[str]:
        return ["train", *shared, *methods, "--output", str(folder / "out")]

    def kept(folder: Path) -> list[str]:
        words = [
            "train",
            *shared,
            "--method",
            "mlp",
            "--min-crop",
            "1",
            "--hflip",
            "0",
            "--output",
            str(folder / "out"),
        ]
        return [*words, "--cache-features", str(folder / "features")]

    def tune(folder: Path) -> list[str]:
        words = ["tune", *shared, "--method", "mona", "--space", str(place / "space.yaml"), "--prune", "halving"]
        return [*words, "--trials", "4", "--output", str(folder / "out")]

    def compare(folder: Path) -> list[str]:
        words = ["compare", str(place / "study.yaml"), "--data", f"photos={photos}", "--output", str(folder / "out")]
        return [*words, "--threads", "1", "--workers", "0", "--accelerator", "cpu"]

    found = [
        Command(each.__name__, each, lambda folder, each=each: [*each(folder), "--resume"]) for each in (train, kept)
    ]
    found += [Command(each.__name__, each, each) for each in (tune, compare)]
    return {command.name: command for command in found}


# ------------------------------------------------------------------ real commands, killed after some time
def run_for(words: list[str], seconds: float | None, log: Path) -> tuple[int, float]:
    """Start the command in a process group of its own, and kill all of it after so many seconds. (exit code, how long
    it took)."""
    started = time.monotonic()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_LINE, *words],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, time.monotonic() - started


# ------------------------------------------------------------------ forked commands, killed at a change of a folder
def run_until_change(words: list[str], folder: Path, when: Callable[[list[str]], bool], log: Path) -> int:
    """Run a command in a process that kills itself just before a change below `folder`: a rename or removal of a file.
    when: of the changes so far and the coming one, as words such as "replace last.ckpt", says whether it dies. Returns
    the exit code, -9 where it died.

    Processes are forked from one that has imported everything, so that a kill costs no start of python."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_and_die, args=(words, folder, when, log))
    process.start()
    process.join()
    return process.exitcode


@dataclass(frozen=True)
class Nth:
    """The n-th change, or the n-th of those named."""

    n: int
    change: str | None = None

    def __call__(self, changes: list[str]) -> bool:
        named = [change for change in changes if self.change in (None, change)]
        return len(named) == self.n and self.change in (None, changes[-1])


def _run_and_die(words: list[str], folder: Path, when: Callable[[list[str]], bool], log: Path) -> None:
    from deltalens.cli.main import main

    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    changes: list[str] = []

    def watched(name: str, function: Callable) -> Callable:
        def act(path, *rest, **options):
            target = Path(os.fsdecode(rest[0] if name == "replace" else path))
            below = target.is_absolute() and target.is_relative_to(folder)
            if below and not is_leftover(target) and (name == "replace" or target.exists()):
                changes.append(f"{name} {target.name}")
                if when(changes):
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *rest, **options)

        return act

    os.replace, os.unlink = watched("replace", os.replace), watched("unlink", os.unlink)
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = main(words)
        sys.stdout.flush()
        os._exit(code)


# ------------------------------------------------------------------ what a folder holds
def check_whole(folder: Path) -> None:
    """Every file under its final name can be read to its end; what is half-written has a name that says so."""
    for file in (path for path in folder.rglob("*") if path.is_file() and not is_leftover(path)):
        if file.name == "search.db-journal":
            continue  # sqlite's own, which the next opening rolls back
        READERS[file.suffix](file)


def _picture(file: Path) -> None:
    with Image.open(file) as picture:
        picture.load()


def _database(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def _page(file: Path) -> None:
    assert file.read_text(encoding="utf-8").rstrip().endswith("</html>"), file


def _text(file: Path) -> None:
    assert file.read_text(encoding="utf-8").endswith("\n"), file


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".yaml": lambda file: yaml.safe_load(file.read_text(encoding="utf-8")),
    ".safetensors": load_file,
    ".ckpt": lambda file: torch.load(file, weights_only=True)["state_dict"],
    ".npy": np.load,
    ".svg": xml.etree.ElementTree.parse,
    ".db": _database,
    ".html": _page,
    ".csv": _text,
    ".md": _text,
    ".tex": _text,
    ".jpg": _picture,
    ".lock": lambda file: None,  # empty
}


TIMES = {"seconds", "finished", "features", "training_seconds", "total_seconds", "output", "cache_features"}


def outcome(folder: Path) -> dict[str, Any]:
    """Name -> content of every file, without times and the folder's own name. Temporary files count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): _content(file) for file in files}


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return {name: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for name, t in load_file(file).items()}
    if file.suffix in (".json", ".yaml"):
        return _timeless(READERS[file.suffix](file))
    if file.suffix == ".csv":
        with open(file, newline="", encoding="utf-8") as rows:
            return [_timeless(row) for row in csv.DictReader(rows)]
    if file.suffix == ".db":
        return _trials(file)
    if file.name == "table.md":  # seconds are the last column
        return [line.rsplit("|", 2)[0] for line in file.read_text(encoding="utf-8").splitlines()]
    return file.read_bytes() if file.suffix in (".npy", ".md") else None


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _trials(file: Path) -> list[tuple]:
    import optuna

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{file}")
    return [(t.number, t.state.name, t.value, t.params, t.intermediate_values, t.user_attrs) for t in study.trials]
