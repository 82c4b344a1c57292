"""How long attaching, saving, loading, merging and detaching take beside torch's own reading and writing."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import deltalens as dl
from deltalens.lifecycle.state import adapter_of
from deltalens.studies.bench_report import Report, Row, Section, Target
from deltalens.studies.benchmarks import Options, random_backbone
from deltalens.studies.measure import CLOCKS

MODEL, QUICK_MODEL = "timm/vit_large_patch16_224", "deltalens/vit-mini"
BEYOND_TORCH_LIMIT = 1.0  # seconds, for each of attach, save, load on ViT-L
WRITE, READ = "torch.save", "torch.load"


def bench_lifecycle(options: Options) -> Report:
    """Seconds of each step with a Mona adapter: on the model as timm builds it, random weights, files on local disk.

    torch.save and torch.load move the same tensors; what save_pretrained and load_adapter take beyond them is ours: the
    model card, the fingerprint of the backbone, flushing to disk, building and placing the modules.
    """
    options = options.settled(MODEL, QUICK_MODEL)
    backbone = random_backbone(options)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, taken in _one_round(backbone, Path(folder), options).items():
                seconds.setdefault(name, []).append(taken)
        stored = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
    rows = [Row(name, statistics.median(taken)) for name, taken in seconds.items()]
    beyond = {
        "attach": 0.0,
        "save_pretrained": -statistics.median(seconds[WRITE]),
        "load_adapter": -statistics.median(seconds[READ]),
    }
    targets = []
    if options.model == MODEL:
        targets = [
            Target(
                f"ViT-L: {name} beyond torch's own I/O, seconds",
                statistics.median(seconds[name]) + minus,
                BEYOND_TORCH_LIMIT,
            )
            for name, minus in beyond.items()
        ]
    settings = {"model": options.model, "method": "mona", "rounds": options.rounds, "clock": options.clock}
    return Report("Lifecycle", settings, [Section("step", rows)], targets, [f"adapter file {stored / 1e6:.1f} MB"])


def _one_round(backbone: torch.nn.Module, folder: Path, options: Options) -> dict[str, float]:
    read = CLOCKS[options.clock]
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable):
        start = read()
        result = run()
        seconds[name] = read() - start
        return result

    model, fresh = copy.deepcopy(backbone), copy.deepcopy(backbone)
    timed("attach", lambda: dl.attach(model, dl.MonaConfig()))
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    adapter_of(model)[1].info["class_names"] = [f"class {i}" for i in range(100)]
    timed("save_pretrained", lambda: dl.save_pretrained(model, folder / "adapter"))
    timed(WRITE, lambda: torch.save(tensors, folder / "tensors.pth"))
    timed("load_adapter", lambda: dl.load_adapter(fresh, folder / "adapter"))
    timed(READ, lambda: torch.load(folder / "tensors.pth", weights_only=True))
    timed("set_adapter", lambda: dl.set_adapter(fresh, "default"))
    timed("detach", lambda: dl.detach(model))
    timed("merge_and_unload", lambda: dl.merge_and_unload(fresh))
    return seconds
