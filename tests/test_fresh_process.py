"""One fresh process for all: importing stays light, and adapters saved here answer there as they do here."""

import json
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
import torch
from hub_cache import write_open_clip
from models import images, randomize_adapter, tiny_swin
from peft_tuners import method_of
from safetensors.torch import load_file, save_file

import deltalens as dl

TUNERS = ("loha", "dora", "vera", "ia3", "vblora", "randlora", "psoft", "adamss")


def write(folder: Path, models: dict[str, tuple[torch.nn.Module, torch.Tensor]]) -> None:
    """Save each adapted model in a folder of its name, its images, and what it answers to them."""
    answers = {}
    for name, (model, x) in models.items():
        randomize_adapter(model).eval()
        dl.save_pretrained(model, folder / name)
        with torch.no_grad():
            answers[name] = model(x)
    save_file({name: x for name, (_, x) in models.items()}, folder / "images.safetensors")
    save_file(answers, folder / "expected.safetensors")


def shipped(name: str):
    model = dl.create_backbone(f"deltalens/{name}", num_classes=4)
    dl.attach(model, [dl.MonaConfig(bottleneck=4), dl.LoRAConfig(r=2)])
    dl.adapter_info(model)["class_names"] = list("abcd")
    return model, torch.randn(2, *dl.preprocessing(model)["input_size"])


def clip(folder: Path):
    write_open_clip(folder, depth=3)
    templates = ["a photo of a {}.", "a drawing of a {}."]
    model = dl.create_backbone(str(folder), class_names=["red", "green", "blue"], templates=templates)
    dl.attach(model, dl.MMAConfig(start=2, bottleneck=4, alpha=0.1))
    dl.adapter_info(model)["class_names"] = ["red", "green", "blue"]
    return model, torch.randn(2, 3, 32, 32)


def tuned(tuner: str):
    return dl.attach(tiny_swin(), method_of(tuner)), images("swin")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fresh")
    torch.manual_seed(0)
    write(root / "shipped", {name: shipped(name) for name in ("vit-mini", "swin-mini")})
    write(root / "clip", {"adapter": clip(root / "backbone")})
    write(root / "tuners", {tuner: tuned(tuner) for tuner in TUNERS})
    run = subprocess.run([sys.executable, fresh_process.__file__, str(root)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return root


def found(world: Path, part: str):
    """What the fresh process found in one of its parts."""
    report = json.loads((world / "report.json").read_text())[part]
    assert "error" not in report, report["error"]
    return report["found"]


def test_attach_imports_nothing_heavy(world):
    assert found(world, "light") == []


@pytest.mark.parametrize(
    ("part", "classes"),
    [
        ("shipped", {"vit-mini": list("abcd"), "swin-mini": list("abcd")}),
        ("clip", {"adapter": ["red", "green", "blue"]}),
        ("tuners", dict.fromkeys(TUNERS)),
    ],
)
def test_adapters_answer_as_here(world, part, classes):
    assert found(world, part) == classes
    there, here = (load_file(world / part / f"{name}.safetensors") for name in ("found", "expected"))
    assert there.keys() == here.keys() == classes.keys()
    assert [name for name in here if not torch.equal(there[name], here[name])] == []
