"""A small study on coloured pictures, and what its runs left."""

import json
from pathlib import Path

import pytest
from picture_folders import write_splits, write_tiny_backbone

from deltalens.cli.main import main
from deltalens.studies.grid import Grid
from deltalens.studies.study_reader import read_study

STUDY = """\
title: Colours
backbones: {model: MODEL, label: tiny}
methods:
  Linear: linear
  LoRA + biases: {methods: [{method: lora, r: 2}, bitfit], x: 2, curve: LoRA}
seeds: [0, 1]
lr: {relative: [1, 0.1]}
training: {epochs: 2, batch_size: 8, warmup_epochs: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and a backbone."""
    folder = tmp_path_factory.mktemp("study")
    write_splits(folder / "photos", train=8, val=4, test=6)
    write_tiny_backbone(folder / "model")
    return folder


def write_study(place: Path, folder: Path, text: str = STUDY) -> Path:
    file = folder / "study.yaml"
    file.write_text(text.replace("MODEL", str(place / "model")))
    return file


def compare(place: Path, file: Path, output: Path, *words: str) -> int:
    return main(["compare", str(file), "--output", str(output), "--data", f"photos={place / 'photos'}", *words])


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """(study file, output) of a study that has been run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_study(place, folder)
    assert compare(place, file, folder / "out") == 0
    return file, folder / "out"


def results_of(output: Path) -> dict[str, dict]:
    return {
        file.parent.relative_to(output / "runs").as_posix(): json.loads(file.read_text())
        for file in output.rglob("results.json")
    }


def grid_of(place, file, output) -> Grid:
    return Grid(read_study(file, {"photos": str(place / "photos")}), output)
