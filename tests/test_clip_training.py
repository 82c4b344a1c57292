"""Classifiers made of texts through the command line, from folders in the formats of open_clip and transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_cache import write_open_clip, write_transformers, write_words
from picture_folders import CLASSES, write_pictures

import deltalens as dl
from deltalens.cli.main import main

LIBRARIES = ("open_clip", "transformers")
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]
PROBE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Small random models with their tokenizers, pictures, and an adapter of MMA trained on them for each library."""
    root = tmp_path_factory.mktemp("world")
    write_open_clip(root / "open_clip", depth=3)
    write_transformers(root / "transformers", "clip")
    write_words(root / "transformers", "a photo drawing of blue green red .")
    write_pictures(root / "flat", 8)
    shared = ["train", "--data", str(root / "flat"), "--templates", json.dumps(TEMPLATES), "--workers", "0"]
    shared += [
        "--lr",
        "0.02",
        "--method",
        "mma",
        "--method.start",
        "2",
        "--method.bottleneck",
        "4",
        "--method.alpha",
        "0.1",
    ]
    for name in LIBRARIES:
        words = ["--model", str(root / name), "--output", str(root / f"of_{name}"), "--epochs", "3"]
        assert main([*shared, *words, "--batch-size", "6"]) == 0
    return root


@pytest.mark.parametrize("library", LIBRARIES)
def test_train_evaluate_predict(library, world, capsys):
    folder = world / f"of_{library}"
    results = json.loads((folder / "results.json").read_text())
    history = [row["train_loss"] for row in results["history"]]
    assert history[-1] < history[0]
    assert main(["evaluate", str(folder), "--data", str(world / "flat"), "--output", str(world / "e.json")]) == 0
    assert json.loads((world / "e.json").read_text())["loss"] == pytest.approx(results["test"]["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["predict", str(folder), str(world / "flat/red/000.jpg"), "--format", "json", "--topk", "3"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert sorted(each["class"] for each in found) == sorted(CLASSES)
    assert sum(each["probability"] for each in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_files_say_the_texts(library, world):
    base = json.loads((world / f"of_{library}/adapter_config.json").read_text())["base_model"]
    assert base["kwargs"] == {"class_names": list(CLASSES), "templates": TEMPLATES}
    assert base["library"] == {"open_clip": "open_clip", "transformers": "hf"}[library]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_adapter_loads_and_serves_other_classes(library, world):
    model = dl.from_pretrained(world / f"of_{library}")
    assert isinstance(model, dl.ZeroShotClassifier)
    assert dl.class_names(model) == list(CLASSES)
    plain = dl.create_backbone(str(world / library), class_names=list(CLASSES), templates=TEMPLATES).eval()
    with torch.no_grad():
        trained = model(PROBE)
        with dl.disable_adapter(model):
            torch.testing.assert_close(model(PROBE), plain(PROBE), atol=1e-5, rtol=1e-5)
        assert (trained - plain(PROBE)).abs().max() > 1e-4
        model.set_classes(["red", "green"])  # other classes and an order of its own: the adapter stays
        torch.testing.assert_close(model(PROBE), trained[:, [2, 1]], atol=1e-5, rtol=1e-5)


FRESH = """
import sys, torch, deltalens as dl
print("LOGITS", dl.from_pretrained(sys.argv[2])(torch.load(sys.argv[1])).tolist())
"""


@pytest.mark.slow  # test_fresh_process.py does it with an adapter that no command trained
@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_a_fresh_process_computes_the_same(library, world):
    torch.save(PROBE, world / "probe.pt")
    folder = str(world / f"of_{library}")
    here = dl.from_pretrained(folder)(PROBE).tolist()
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # rounding depends on their number
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(world / "probe.pt"), folder],
        capture_output=True, text=True, env=os.environ | threads,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    there = run.stdout.partition("LOGITS ")[2].strip()
    assert json.loads(there) == here


def test_one_tower_only(world, tmp_path):
    words = ["train", "--model", str(world / "open_clip"), "--data", str(world / "flat"), "--output", str(tmp_path)]
    words += ["--templates", json.dumps(TEMPLATES[:1]), "--tower", "vision", "--method", "lora", "--epochs", "1"]
    assert main([*words, "--workers", "0", "--batch-size", "12"]) == 0
    model = dl.from_pretrained(tmp_path)
    changed = [name for name, _ in model.named_parameters() if ".delta." in name]
    assert changed
    assert all(name.startswith("clip.visual.") for name in changed)


def test_templates_need_a_text_tower(world, tmp_path, capsys):
    words = ["train", "--model", "deltalens/vit-mini", "--data", str(world / "flat"), "--output", str(tmp_path / "x")]
    capsys.readouterr()
    assert main([*words, "--templates", json.dumps(TEMPLATES), "--method", "linear"]) == 1
    assert "has no text tower" in capsys.readouterr().err
    assert main([*words, "--method", "mma"]) == 1
    assert "needs one image tower and one text tower" in capsys.readouterr().err


INSPECTED = {
    "mma": (dl.MMAConfig(start=2, bottleneck=4), ["--method.start", "2", "--method.bottleneck", "4"]),
    "coop": (dl.CoOpConfig(num_words=3, per_class=True), ["--method.num_words", "3", "--method.per_class", "true"]),
    "lora": (dl.LoRAConfig(), []),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", INSPECTED)
def test_inspect_shows_both_towers(library, method, world, capsys):
    config, words = INSPECTED[method]
    shared = ["inspect", "--model", str(world / library), "--templates", json.dumps(TEMPLATES), "--num-classes", "4"]
    capsys.readouterr()
    assert main([*shared, "--method", method, *words]) == 0
    text = capsys.readouterr().out
    model = dl.create_backbone(str(world / library), class_names=list("abcd"), pretrained=False)
    count = dl.count_parameters(dl.attach(model, config))
    assert f"trained without head {count.adapter:>14,}" in text
    assert f"backbone             {count.backbone:>14,}" in text
    assert "tower     vision: 3 blocks" in text
    assert "tower     text: 3 blocks" in text
    assert "words.in" in text
    assert "around them: logits, output, text.context" in text
    blocks = [line for line in text.splitlines() if line.endswith(" blocks)")]
    if method == "coop":
        assert not blocks
        assert "around the towers\n    text.context           coop: Context" in text
        assert f"ctx (4, 3, {16 if library == 'open_clip' else 24})" in text
        return
    assert len(blocks) == 2  # towers are not mixed, where they are of one width either
    assert all(line.endswith("(2 blocks)" if method == "mma" else "(3 blocks)") for line in blocks)
    assert text.count("20 of them shared with another place") == (2 if method == "mma" else 0)


def test_inspect_shows_the_one_tower_that_is_adapted(world, capsys):
    words = ["--templates", "a photo of a {}.", "--tower", "text", "--method", "lora"]
    assert main(["inspect", "--model", str(world / "open_clip"), *words]) == 0
    text = capsys.readouterr().out
    assert "tower     vision" not in text
    model = dl.create_backbone(str(world / "open_clip"), class_names=["a", "b"], pretrained=False)
    assert f"{dl.count_parameters(dl.attach(model, dl.LoRAConfig(), tower='text')).adapter:,}" in text
    assert main(["inspect", "--templates", "a photo of a {}."]) == 1
    assert "has no text tower" in capsys.readouterr().err


def test_descriptions_of_classes(world, tmp_path, capsys):
    sentences = {"Red": ["blood", "a red thing"], "green": ["grass"], "blue": ["the blue sky"], "grey": ["fog"]}
    (tmp_path / "told.json").write_text(json.dumps(sentences))
    words = ["train", "--model", str(world / "open_clip"), "--data", str(world / "flat"), "--method", "zero_shot"]
    words += ["--descriptions", str(tmp_path / "told.json")]
    assert main([*words, "--output", str(tmp_path / "plain")]) == 0
    model = dl.from_pretrained(tmp_path / "plain")
    assert model.descriptions == {"blue": ("the blue sky",), "green": ("grass",), "red": ("blood", "a red thing")}
    words += ["--templates", "a {}, which has {description}.", "--output", str(tmp_path / "filled")]
    assert main(words) == 0
    assert dl.from_pretrained(tmp_path / "filled").descriptions["green"] == ("a {}, which has grass.",)
    assert main([*words[:-3], "a {}.", "--output", str(tmp_path / "no")]) == 1
    assert "has none; leave templates out" in capsys.readouterr().err
