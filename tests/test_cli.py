"""The command line, through `main(argv)`: what a user types, reads and finds on disk."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from picture_folders import write_pictures, write_splits, write_tiny_backbone
from safetensors.torch import load_file

import deltalens as dl
from deltalens.cli.main import COMMANDS, main
from deltalens.cli.method_options import read_methods, translate
from deltalens.tasks import ClassificationTask


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny backbone, an unsplit folder of pictures and one with split folders."""
    root = tmp_path_factory.mktemp("world")
    write_tiny_backbone(root / "tiny")
    write_pictures(root / "flat", 14)
    write_splits(root / "split", 6, 3, 3)
    return root


@pytest.fixture(autouse=True)
def _in_world(world, monkeypatch):
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def trained(world) -> Path:
    """A finished run on the unsplit folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert main([*TRAIN, "--output", "trained", "--epochs", "8"]) == 0
    return world / "trained"


TRAIN = ["train", "--model", "tiny", "--data", "flat", "--batch-size", "6", "--lr", "1e-2"]
TRAIN += ["--method", "mona", "--method.bottleneck", "4"]


def fails(capsys, argv: list[str], code: int = 1) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("deltalens: error: ")
    return lines[0]


# ------------------------------------------------------------------ train, evaluate, predict
def test_train_leaves_a_complete_folder(trained, capsys):
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "metrics.csv",
        "results.json",
    }
    results = json.loads((trained / "results.json").read_text())
    assert results["val"]["accuracy"] > 0.8
    assert results["data"]["train"] == 30
    assert results["versions"]["torch"] == torch.__version__
    assert len(list(csv.DictReader((trained / "metrics.csv").open()))) == 8
    card = (trained / "README.md").read_text()
    assert "blue, green, red" in card
    assert "val accuracy" in card
    info = json.loads((trained / "adapter_config.json").read_text())["info"]
    assert info["class_names"] == ["blue", "green", "red"]
    assert info["preprocessing"]["input_size"] == [3, 32, 32]


def test_evaluate_measures_what_training_reported(trained, capsys):
    results = json.loads((trained / "results.json").read_text())
    for split in ("val", "test"):
        assert main(["evaluate", "trained", "--data", "flat", "--split", split, "--output", "e.json"]) == 0
        measured = json.loads(Path("e.json").read_text())
        assert measured["images"] == results["data"][split]
        assert measured["accuracy"] == results[split]["accuracy"]
        assert measured["loss"] == pytest.approx(results[split]["loss"], rel=1e-5)
    assert main(["evaluate", "trained", "--data", "split", "--split", "train"]) == 0
    assert "images               18" in capsys.readouterr().out


def test_predict_in_every_format(trained, capsys):
    capsys.readouterr()
    assert main(["predict", "trained", "flat/red", "flat/*/001.png", "--format", "json", "--topk", "2"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 16  # flat/red/001.png is asked for twice and predicted once
    assert [entry["image"] for entry in entries[-2:]] == ["flat/blue/001.png", "flat/green/001.png"]
    right = [entry["predictions"][0]["class"] == Path(entry["image"]).parent.name for entry in entries]
    assert sum(right) >= 13
    best, second = (prediction["probability"] for prediction in entries[0]["predictions"])
    assert 1 >= best > second >= 0

    assert main(["predict", "trained", "flat/red/000.jpg", "--format", "csv", "--topk", "9", "--output", "p.csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(Path("p.csv").read_text())))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)
    assert float(rows[0]["probability"]) == pytest.approx(entries[0]["predictions"][0]["probability"], abs=1e-6)

    capsys.readouterr()
    assert main(["predict", "trained", "flat/red/000.jpg"]) == 0
    image, name, percent = capsys.readouterr().out.split()
    assert image == "flat/red/000.jpg"
    assert name == rows[0]["class"]
    assert float(percent.rstrip("%")) == pytest.approx(100 * float(rows[0]["probability"]), abs=0.06)


def test_config_reproduces_the_run(trained):
    assert main(["train", "--config", "trained/config.yaml", "--output", "again"]) == 0
    first, second = (load_file(Path(run) / "adapter_model.safetensors") for run in ("trained", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [yaml.safe_load(Path(run, "config.yaml").read_text()) for run in ("trained", "again")]
    assert {**configs[0], "output": ""} == {**configs[1], "output": ""}
    assert main(["train", "--config", "trained/config.yaml", "--output", "other", "--seed", "1", "--epochs", "1"]) == 0
    third = load_file("other/adapter_model.safetensors")
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_resume_through_the_command_line(trained, monkeypatch, capsys):
    words = ["train", "--config", "trained/config.yaml", "--output", "resumed"]
    forward, calls = ClassificationTask.forward, []

    def stop_at_the_13th_step(task, batch):
        calls.extend([1] if task.training else [])
        if len(calls) == 13:
            raise KeyboardInterrupt
        return forward(task, batch)

    monkeypatch.setattr(ClassificationTask, "forward", stop_at_the_13th_step)
    assert "--resume" in fails(capsys, words, code=130)
    monkeypatch.setattr(ClassificationTask, "forward", forward)
    assert "unfinished run; pass --resume" in fails(capsys, words)
    assert "bottleneck" in fails(capsys, [*words, "--resume", "--method", "mona", "--method.bottleneck", "6"])
    assert main(["train", "--output", "resumed", "--resume"]) == 0
    first, second = (load_file(Path(run) / "adapter_model.safetensors") for run in ("trained", "resumed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert main([*words, "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_methods_combine_and_a_checkpoint_file_is_a_backbone(world):
    torch.save(dl.create_backbone("timm/test_vit", pretrained=False).state_dict(), "weights.pth")
    words = (
        "train --model timm/test_vit --checkpoint weights.pth --img-size 32 --data split --epochs 1 --output combined "
        "--method lora --method.r 2 --method.parts=[q,k,v] --method bitfit"
    )
    assert main(words.split()) == 0
    methods = yaml.safe_load(Path("combined/config.yaml").read_text())["method"]
    assert [(m["method"], m.get("r"), m.get("parts")) for m in methods] == [
        ("lora", 2, ["q", "k", "v"]),
        ("bitfit", None, None),
    ]
    assert main(["evaluate", "combined", "--data", "split"]) == 0


def test_few_shots_of_the_base_classes(world, capsys):
    words = "train --model tiny --data split --method linear --shots 2 --classes base --seed 3 --epochs 1 --output few"
    assert main(words.split()) == 0
    assert "2 classes, 4 training, 4 validation, 6 test images" in capsys.readouterr().out
    origin = json.loads(Path("few/results.json").read_text())["data"]
    assert {key: origin[key] for key in ("shots", "shots_seed", "shots_from", "class_subset")} == {
        "shots": 2, "shots_seed": 3, "shots_from": "drawn", "class_subset": "base"
    }  # fmt: skip
    for split, count in (("train", 4), ("test", 6)):
        assert main(["evaluate", "few", "--data", "split", "--split", split]) == 0
        assert f"{count} ({split})" in capsys.readouterr().out
    error = fails(capsys, ["evaluate", "few", "--data", "split", "--classes", "all"])
    assert "the data has other classes than the 2 of the model: red" in error
    assert "would join them" in fails(capsys, [*words.split(), "--protocol", "trainval", "--output", "no"])


def test_methods_in_yaml(world):
    for method in ("lora", {"method": "lora"}, ["lora"], [{"method": "lora"}]):
        assert read_methods(method) == [dl.LoRAConfig()]
    words = translate(["--epochs", "3", "--method=mona", "--method.kernels", "[3, 5]", "--method", "bitfit", "--lr=1"])
    assert words[:3] == ["--epochs", "3", "--lr=1"]
    assert read_methods(json.loads(words[-1])) == [dl.MonaConfig(kernels=(3, 5)), dl.BitFitConfig()]
    with pytest.raises(ValueError, match="a method is a name"):
        read_methods([{"bottleneck": 3}])


# ------------------------------------------------------------------ wrong commands and options
def test_unknown_commands_and_options_name_the_nearest(capsys):
    assert "did you mean train?" in fails(capsys, ["trian"], 2)
    assert "did you mean --epochs " in fails(capsys, ["train", "--epoch", "3", "--data", "flat", "--output", "x"], 2)
    assert "did you mean --batch-size" in fails(capsys, [*TRAIN, "--output", "x", "--batchsize=3"], 2)
    Path("wrong.yaml").write_text("epoch: 3\n")
    assert "did you mean --epochs " in fails(capsys, ["train", "--config", "wrong.yaml"], 2)
    assert "required" in fails(capsys, ["train", "--data", "flat"], 2)
    assert "epochs" in fails(capsys, [*TRAIN, "--output", "x", "--epochs", "many"], 2)
    assert "does not exist" in fails(capsys, ["train", "--config", "nowhere.yaml"], 2)
    assert "after the --method" in fails(capsys, ["train", "--method.bottleneck", "3"], 2)
    assert "classify-mona" in fails(capsys, ["train", "--recipe", "clasify-mona"], 2)
    assert not Path("x").exists()


def test_unknown_methods_settings_and_models_name_the_nearest(capsys):
    words = ["train", "--data", "flat", "--output", "x"]
    assert "did you mean mona?" in fails(capsys, [*words, "--method", "monna"])
    assert "did you mean bottleneck?" in fails(capsys, [*words, "--method", "mona", "--method.bottelneck", "3"])
    assert "timm/swin_tiny_patch4_window7_224" in fails(capsys, [*words, "--model", "timm/swin_tiny_patch4_windw7_224"])
    assert "deltalens/vit-mini" in fails(capsys, [*words, "--model", "deltalens/vit-mni"])
    assert "no checkpoint file at" in fails(capsys, [*words, "--model", "tiny", "--checkpoint", "nowhere.pth"])
    assert "lr must be positive" in fails(capsys, [*words, "--model", "tiny", "--lr", "0"])
    assert not Path("x").exists()


def test_input_sizes_that_do_not_fit(capsys):
    words = ["train", "--data", "flat", "--output", "x", "--model", "timm/test_vit", "--pretrained", "false"]
    assert "--img-size 50" in fails(capsys, [*words, "--img-size", "50"])
    assert "img-size" in fails(capsys, ["inspect", "--model", "tiny", "--img-size", "0"])


# ------------------------------------------------------------------ wrong data
def test_data_errors(tmp_path, capsys, trained):
    words = ["train", "--model", "tiny", "--output", "x", "--epochs", "1", "--data"]
    assert "no data folder at" in fails(capsys, [*words, "nowhere"])
    assert "no class folders" in fails(capsys, [*words, str(tmp_path)])
    write_splits(tmp_path, 4, 2, 2)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "crimson")
    assert "only in test: crimson; in train but not in test: red" in fails(capsys, [*words, str(tmp_path)])
    assert "not among the 3 known classes: crimson" in fails(capsys, ["evaluate", "trained", "--data", str(tmp_path)])
    (tmp_path / "test" / "crimson").rename(tmp_path / "test" / "red")
    (tmp_path / "train" / "red" / "000.jpg").write_bytes(b"no picture")
    assert "000.jpg" in fails(capsys, [*words, str(tmp_path)])
    assert not Path("x").exists()
    assert main([*words, str(tmp_path), "--skip-broken", "true"]) == 0
    assert json.loads(Path("x/results.json").read_text())["data"]["train"] == 11


def test_predict_errors(trained, capsys, tmp_path):
    assert "no images at nothing" in fails(capsys, ["predict", "trained", "nothing*.png"])
    assert "is no adapter" in fails(capsys, ["predict", "flat", "flat/red"])
    assert "no device" in fails(capsys, ["predict", "trained", "flat/red", "--device", "abacus"])
    assert "topk" in fails(capsys, ["predict", "trained", "flat/red", "--topk", "0"])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    assert "bad.png" in fails(capsys, ["predict", "trained", "flat/red/000.jpg", str(bad)])
    assert main(["predict", "trained", "flat/red/000.jpg", str(bad), "--skip-broken", "true"]) == 0


def test_debug_shows_where_and_defects_are_not_hidden(capsys, monkeypatch):
    assert main(["list", "methods", "zzz", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(dl, "create_backbone", lambda *a, **k: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr("deltalens.cli.list._recipes", lambda args: {}["no such key"])
    monkeypatch.setattr(
        "deltalens.cli.list._models", None
    )  # calling it fails in our own code, which is no message either
    for words in (["inspect", "--model", "tiny"], ["list", "recipes"], ["list", "models"]):
        assert main(words) == 1
        captured = capsys.readouterr().err
        assert "Traceback" in captured
        assert "defect" in captured


# ------------------------------------------------------------------ inspect, list, help
def test_inspect_counts_what_attach_trains(capsys):
    words = ["--method", "mona", "--method.bottleneck", "4", "--method", "bitfit", "--num-classes", "9"]
    assert main(["inspect", "--model", "tiny", *words]) == 0
    text = capsys.readouterr().out
    model = dl.attach(dl.create_backbone("tiny", num_classes=9), [dl.MonaConfig(bottleneck=4), dl.BitFitConfig()])
    count = dl.count_parameters(model)
    for number in (count.adapter, count.trainable, count.backbone):
        assert f"{number:,}" in text
    assert "blocks.0 to blocks.2 (3 blocks)" in text
    assert "mlp.stream" in text
    assert "project1.weight (4, 24)" in text
    assert "head.weight (9, 24)" in text
    assert main(["inspect", "--model", "tiny", "--method", "lora", "--tensors", "true"]) == 0
    text = capsys.readouterr().out
    assert "weights:q" in text
    assert "blocks.2.attn.qkv.delta.v.adapter_default.lora.lora_B.weight (24, 8)" in text


def test_lists(capsys):
    assert main(["list", "methods", "v*"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("vpt ")
    assert "--method.num_tokens 50" in text
    assert main(["list", "models", "deltalens/*"]) == 0
    assert set(capsys.readouterr().out.split()) == {
        f"deltalens/{name}-mini" for name in ("swin", "vit", "clip", "points")
    }
    assert main(["list", "recipes"]) == 0
    assert "classify-mona" in capsys.readouterr().out
    assert "recipes" in fails(capsys, ["list", "nets"], 2)


def test_recipes_are_valid_options(capsys):
    assert (
        main(["train", "--recipe", "classify-mona", "--data", "d", "--output", "o", "--epochs", "7", "--print_config"])
        == 0
    )
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["epochs"] == 7
    assert config["weight_decay"] == 0.05
    assert read_methods(config["method"]) == [dl.MonaConfig(bottleneck=64)]


def test_help_needs_no_torch():
    """`deltalens --help` and `deltalens train --help` answer without importing torch."""
    script = (
        "import sys\n"
        "from deltalens.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "assert 'jsonargparse' not in sys.modules\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['predict', '--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout
    assert "--warmup-epochs" in done.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"deltalens {dl.__version__}"
