"""Folders of studies as `deltalens compare` leaves them, with made-up results: nothing is trained."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from deltalens.studies.grid import Grid
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_table import StudyTable, read_table

METHODS = {  # label: (entry of the file, trained parameters of a ViT-S, points above the linear head)
    "Linear": ("linear", 0, 0.0),
    "LoRA": ("{method: lora, r: 4}", 147_456, 0.075),
    "VPT-deep": ("{method: vpt, num_tokens: 10}", 46_080, 0.055),
    "Mona": ("{method: mona, bottleneck: 32}", 663_168, 0.105),
    "Full": ("full", 21_665_664, 0.085),
}
BACKBONES = {"ViT-S": (21_665_664, 384, 0.0), "Swin-T": (27_519_354, 768, 0.025)}
DATASETS = {"flowers": (0.78, 102), "pets": (0.83, 37), "textures": (0.61, 47)}
EPOCHS = 12


def study_text(methods=METHODS, backbones=BACKBONES, datasets=DATASETS, seeds=(0, 1, 2), extra="") -> str:
    lines = ["title: Which adapter for small sets", "backbones:"]
    lines += [f"- {{model: deltalens/vit-mini, label: {json.dumps(label)}}}" for label in backbones]
    lines += ["datasets:", *(f"  {json.dumps(name)}: nowhere/{number}" for number, name in enumerate(datasets))]
    lines += ["methods:", *(f"  {json.dumps(label)}: {methods[label][0]}" for label in methods)]
    lines += [f"seeds: {list(seeds)}", f"training: {{epochs: {EPOCHS}}}", extra]
    return "\n".join(lines) + "\n"


def results(run, accuracy: float, tested: bool = True, memory: int | None = None, methods=METHODS) -> dict:
    """What a run's results.json holds, as far as tables and reports read it."""
    rng = np.random.default_rng(zlib.crc32(str(run.folder.relative_to(run.folder.parents[3])).encode()))
    shape = 1 - 0.6 * np.exp(-np.arange(1, EPOCHS + 1) / 3) + rng.normal(0, 0.006, EPOCHS)
    val = np.clip(accuracy * shape / shape[-1], 0, 1)
    backbone, width, _ = BACKBONES.get(run.backbone.label, BACKBONES["ViT-S"])
    adapter = backbone if run.variant.is_full else methods[run.variant.label][1]
    head = (width + 1) * DATASETS.get(run.dataset.source, (0, 10))[1]
    share = {"adapter": adapter, "head": head, "backbone": backbone, "percent": 100 * adapter / backbone}
    seconds = 40 + adapter / 4e5 + float(rng.uniform(0, 3))
    whole = 4 * (backbone + head) + 16_000
    images = 40 * head // (width + 1)  # 40 of each class
    return {
        "data": {"train": len(run.dataset.subset.indices([0] * images))},
        "bytes": {
            "adapter": whole if run.variant.is_full else 4 * (adapter + head) + 9_000,
            "backbone": 4 * backbone + 15_800,
            "model": whole,
        },
        "val": {"accuracy": float(val[-1])},
        "test": {"accuracy": accuracy} if tested and run.stage == "final" else {},
        "parameters": share,
        "seconds": {"training": seconds, "total": seconds + 4},
        "settings": {"lr": run.rate or 0.003},
        "machine": "Linux x86_64, 8 CPU cores",
        "finished": f"2026-03-0{1 + run.seed % 9}T10:00:00+00:00",
        "versions": {"deltalens": "0.1.0", "torch": "2.9"},
        "peak_memory_bytes": memory,
        "history": [{"epoch": e, "train_loss": 1 / e, "val_accuracy": float(v)} for e, v in enumerate(val, 1)],
    }


def made_up_accuracy(run) -> float:
    rng = np.random.default_rng(zlib.crc32("/".join(map(str, (*run.cell, run.seed))).encode()))
    task = np.random.default_rng(zlib.crc32("/".join(run.cell).encode()))
    base, gain = DATASETS[run.dataset.source][0], METHODS[run.variant.label][2]
    base -= 0.12 * (1 - (run.dataset.subset.fraction or 1)) * (2 if run.variant.is_full else 1)
    return round(base + BACKBONES[run.backbone.label][2] + gain + task.normal(0, 0.012) + rng.normal(0, 0.006), 4)


def write_study_folder(folder: Path, text: str | None = None, accuracy=made_up_accuracy, **options) -> Grid:
    """folder/study.yaml, and results under folder/out. accuracy: run -> number, a message of a failure, or None for a
    run that is to come."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(text or study_text(), encoding="utf-8")
    grid = Grid(read_study(folder / "study.yaml"), folder / "out")
    for run in grid.runs():
        value = accuracy(run)
        if isinstance(value, str):
            run.note_failure(RuntimeError(value))
        elif value is not None:
            run.output.write_results(results(run, value, **options))
    return grid


def table_of(grid: Grid) -> StudyTable:
    return read_table(grid)


FAILURE = "the loss became <infinite> & training stopped"


def accuracy_with_a_failure(run):
    lost = (run.backbone.label, run.dataset.name, run.variant.label, run.seed) == ("Swin-T", "pets", "VPT-deep", 2)
    return FAILURE if lost else made_up_accuracy(run)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """5 methods x 2 backbones x 3 datasets x 3 seeds, one run failed: (grid, table)."""
    grid = write_study_folder(tmp_path_factory.mktemp("study"), accuracy=accuracy_with_a_failure, memory=3_400_000_000)
    return grid, table_of(grid)
