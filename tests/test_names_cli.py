"""Models of other libraries through the command line, from train to predict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import (
    add_repository,
    register_tiny_torchvision,
    write_open_clip,
    write_timm,
    write_torchvision,
    write_transformers,
)
from picture_folders import write_pictures
from torchvision.models import _api

import deltalens as dl
from deltalens.cli.main import main

TIMM = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Caches with small random weights, and a folder of pictures."""
    root = tmp_path_factory.mktemp("world")
    for kind in ("vit", "dinov3"):
        write_transformers(root / kind, kind)
        add_repository(root / "hf/hub", f"tests/{kind}", root / kind)
    write_open_clip(root / "tiny")
    add_repository(root / "hf/hub", "tests/tiny", root / "tiny")
    write_timm(root / "timm", TIMM)
    add_repository(root / "hf/hub", f"timm/{TIMM}", root / "timm")
    register_tiny_torchvision()
    write_torchvision(root / "torch", "vit_tiny")
    write_pictures(root / "flat", 8)
    yield root
    del _api.BUILTIN_MODELS["vit_tiny"]


@pytest.fixture(autouse=True)
def _offline(world, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(world / "torch"))
    monkeypatch.chdir(world)


METHODS = {
    "hf/tests/vit": ["--method", "lora", "--method.target_modules", r".*\.[qv](uery|alue|_proj)"],
    "open_clip/hf-hub:tests/tiny": ["--method", "bitfit"],
    "torchvision/vit_tiny": ["--method", "bitfit"],
    "hf/tests/dinov3": ["--method", "linear"],
}
DEFAULT = ["hf/tests/vit"]


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_train_evaluate_predict_analyze(name, world, tmp_path, capsys):
    output = str(tmp_path / "run")
    words = ["train", "--model", name, "--data", "flat", "--output", output, "--epochs", "1", "--batch-size", "6"]
    assert main([*words, *METHODS[name], "--workers", "0"]) == 0
    results = json.loads(Path(output, "results.json").read_text())
    assert main(["evaluate", output, "--data", "flat", "--output", str(tmp_path / "e.json"), "--workers", "0"]) == 0
    measured = json.loads((tmp_path / "e.json").read_text())
    assert measured["loss"] == pytest.approx(results["test"]["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["predict", output, "flat/red/000.jpg", "--format", "json", "--topk", "3"]) == 0
    predictions = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert sum(each["probability"] for each in predictions) == pytest.approx(1, abs=1e-5)
    figure = tmp_path / "embeddings.svg"
    assert main(["analyze", "embeddings", output, "--data", "flat", "--split", "all", "--output", str(figure)]) == 0
    assert figure.stat().st_size > 1000
    info = json.loads(Path(output, "adapter_config.json").read_text())
    assert info["base_model"]["mean"] == dl.preprocessing(dl.create_backbone(name))["mean"]


def test_inspect_takes_no_weights(world, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    for name in ("torchvision/vit_tiny", "hf/tests/vit", "open_clip/hf-hub:tests/tiny"):
        assert main(["inspect", "--model", name, "--method", "bitfit", "--num-classes", "9", "--img-size", "64"]) == 0
        assert "input 3x64x64" in capsys.readouterr().out


def test_errors_are_one_line(world, capsys):
    capsys.readouterr()
    for name in ("hf/tests/absent", "torchvision/resnet51", "open_clip/hf-hub:tests/absent"):
        assert main(["train", "--model", name, "--data", "flat", "--output", "x"]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line.startswith("deltalens: error: ") for line in lines] == [True]


FRESH = """
import sys
from deltalens.cli.main import main
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    output = "fresh-" + name.replace("/", "-").replace(":", "-")
    words = ["--method", "bitfit", "--epochs", "1", "--workers", "0", "--batch-size", "6"]
    assert main(["train", "--model", name, "--data", "flat", "--output", output, *words]) == 0
print(*sorted(sys.modules))
"""


@pytest.mark.slow
def test_everything_in_processes_of_their_own(world, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE as a user sets them: trained in one process, rebuilt in another."""
    names = ["hf/tests/vit", "hf/tests/dinov3", "open_clip/hf-hub:tests/tiny", f"timm/{TIMM}"]
    environment = {
        **os.environ,
        "HF_HOME": str(world / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_HOME": str(world / "torch"),
    }
    environment.pop("HF_HUB_CACHE", None)
    run = {"env": environment, "capture_output": True, "text": True, "cwd": world}
    done = subprocess.run([sys.executable, "-c", FRESH, str(Path(__file__).parent), *names], **run)
    assert done.returncode == 0, done.stderr
    for name in names:
        output = "fresh-" + name.replace("/", "-").replace(":", "-")
        script = [sys.executable, "-m", "deltalens.cli.main"]
        done = subprocess.run([*script, "evaluate", output, "--data", "flat", "--workers", "0"], **run)
        assert done.returncode == 0, done.stderr
        results = json.loads((world / output / "results.json").read_text())
        assert f"loss                 {results['test']['loss']:.4f}" in done.stdout
    absent = subprocess.run([*script, "train", "--model", "hf/tests/no", "--data", "flat", "--output", "no"], **run)
    assert absent.returncode == 1
    assert "could not be fetched" in absent.stderr
