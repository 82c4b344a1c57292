"""Commands on point clouds: train, evaluate with votes, predict with figures, tune, compare and the demonstration."""

import contextlib
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cloud_folders import TINY, use_tiny_points, write_cloud_splits
from picture_folders import write_splits, write_tiny_backbone
from safetensors.torch import load_file

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.cloud_transforms import farthest_points, unit_sphere

TRAIN = ["train", "--model", TINY, "--data", "clouds", "--batch-size", "6", "--epochs", "6"]


@pytest.fixture(scope="module", autouse=True)
def _tiny_by_name():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_points(patch)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_cloud_splits(root / "clouds", 8, 4, 5)
    return root


@pytest.fixture(autouse=True)
def _in_world(world, monkeypatch):
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def trained(world) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        words = ["--method", "lora", "--method.r", "4", "--lr", "1e-2", "--epochs", "10", "--output", "trained"]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert main([*TRAIN, *words]) == 0
    assert "3 classes, 24 training, 12 validation, 15 test clouds" in shown.getvalue()
    return world / "trained"


def fails(capsys, argv: list[str], code: int = 1) -> str:
    capsys.readouterr()
    assert main(argv) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ------------------------------------------------------------------ train, evaluate, predict
def test_training_learns_and_says_what_it_read(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["test"]["accuracy"] > 0.8
    assert (results["data"]["format"], results["data"]["kind"]) == ("points-folder", "points")
    info = json.loads((trained / "adapter_config.json").read_text())["info"]
    assert info["preprocessing"] == {"kind": "points", "num_points": 64, "normalize": "unit_sphere"}
    assert "64 points" in (trained / "README.md").read_text()


def test_evaluate_measures_what_training_reported(trained):
    results = json.loads((trained / "results.json").read_text())
    assert main(["evaluate", "trained", "--data", "clouds", "--output", "e.json"]) == 0
    measured = json.loads(Path("e.json").read_text())
    assert measured["clouds"] == 15
    assert measured["accuracy"] == results["test"]["accuracy"]
    assert measured["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)
    assert "votes" not in measured


def test_the_test_sees_the_farthest_points(trained):
    model = dl.from_pretrained(trained)
    cloud = unit_sphere(torch.from_numpy(np.load("clouds/test/long/001.npy")))
    with torch.no_grad():
        wanted = model(cloud[farthest_points(cloud, 64)][None]).softmax(1)[0]
    assert (
        main(
            ["predict", "trained", "clouds/test/long/001.npy", "--format", "json", "--topk", "3", "--output", "p.json"]
        )
        == 0
    )
    (entry,) = json.loads(Path("p.json").read_text())
    said = {each["class"]: each["probability"] for each in entry["predictions"]}
    assert [said[name] for name in ("flat", "long", "round")] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_votes_are_the_mean_of_random_views_and_repeat(trained, capsys, monkeypatch):
    from deltalens.tasks import ClassificationTask

    seen, forward = [], ClassificationTask.forward

    def recorded(task, batch):
        result = forward(task, batch)
        seen.append((batch[0].clone(), result["output"].clone()))
        return result

    monkeypatch.setattr(ClassificationTask, "forward", recorded)
    words = ["evaluate", "trained", "--data", "clouds", "--votes", "3", "--batch-size", "20"]
    losses = []
    for seed in ("0", "0", "1"):
        assert main([*words, "--seed", seed, "--output", "v.json"]) == 0
        losses.append(json.loads(Path("v.json").read_text())["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert json.loads(Path("v.json").read_text())["votes"] == {"views": 3, "seed": 1}
    views = [clouds for clouds, _ in seen[:3]]
    assert len(seen) == 9
    assert all(not torch.equal(a, b) for a, b in ((views[0], views[1]), (views[1], views[2])))
    mean = torch.stack([logits for _, logits in seen[:3]]).mean(0)
    labels = torch.arange(3).repeat_interleave(5)
    assert losses[0] == pytest.approx(float(torch.nn.functional.cross_entropy(mean, labels)), rel=1e-4)
    assert "15 (test, 3 votes)" in capsys.readouterr().out
    assert "--votes must be 0 or more" in fails(capsys, [*words, "--votes", "-1"])


def test_predict_in_every_format_and_as_a_figure(trained, capsys):
    capsys.readouterr()
    assert main(["predict", "trained", "clouds/test/flat", "clouds/test/*/001.npy", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 7
    assert sum(Path(row["image"]).parent.name == row["class"] for row in rows) >= 5
    for name in ("sheet.svg", "sheet.png"):
        assert main(["predict", "trained", "clouds/test", "--topk", "2", "--output", name]) == 0
        assert "15 clouds are drawn" in capsys.readouterr().out
    drawn = Path("sheet.svg").read_text()
    assert len(drawn) < 1_500_000  # points are pixels
    first = next(row for row in rows if row["image"].endswith("flat/000.npy"))
    assert f"<!-- {first['class']}" in drawn
    assert drawn.count("<!-- flat/00") == drawn.count("<!-- long/00") == 5
    assert "no clouds at nothing*: expected a cloud file" in fails(capsys, ["predict", "trained", "nothing*"])
    Path("bad.xyz").write_text("1 2\n")
    assert "cannot read the cloud bad.xyz" in fails(capsys, ["predict", "trained", "bad.xyz"])
    assert main(["predict", "trained", "bad.xyz", "clouds/test/flat", "--skip-broken", "true"]) == 0


def test_other_views_for_training(trained):
    words = [*TRAIN, "--method", "linear", "--epochs", "1"]
    losses = {}
    for augment in ("none", "rotate", "rotate+scale+shift"):
        assert main([*words, "--cloud-augment", augment, "--output", f"a-{augment}"]) == 0
        losses[augment] = json.loads(Path(f"a-{augment}/results.json").read_text())["history"][0]["train_loss"]
    assert len(set(losses.values())) == 3
    options = ["--num-points", "32", "--normalize", "none", "--cache-features", "kept", "--cloud-augment", "none"]
    assert main([*words, *options, "--output", "raw"]) == 0
    info = json.loads(Path("raw/adapter_config.json").read_text())["info"]
    assert info["preprocessing"] == {"kind": "points", "num_points": 32, "normalize": None}


def test_what_does_not_go_together(world, trained, capsys):
    if not Path("pictures").is_dir():
        write_splits(Path("pictures"), 2, 2, 2)
        write_tiny_backbone(Path("images"))
    words = [*TRAIN, "--method", "linear", "--output", "no"]
    assert "min_crop has no meaning for point clouds" in fails(capsys, [*words, "--min-crop", "0.8"])
    assert "unknown augmentation of clouds 'flip'" in fails(capsys, [*words, "--cloud-augment", "scale+flip"])
    assert "--img-size is the edge of images: leave it out" in fails(capsys, [*words, "--img-size", "32"])
    assert "--num-points must be positive" in fails(capsys, [*words, "--num-points", "0"])
    data = ["--data", "pictures"]
    assert "the data are images and the model takes point clouds" in fails(capsys, [*words, *data])
    model = ["--model", "images"]
    assert "the data are point clouds and the model takes images" in fails(capsys, [*words, *model])
    images = [*words, *model, *data]
    assert "cloud_augment has no meaning for images" in fails(capsys, [*images, "--cloud-augment", "none"])
    assert "takes images, which have no --num-points" in fails(capsys, [*images, "--num-points", "9"])
    assert not Path("no").exists()


def test_votes_and_figures_are_for_clouds(world, capsys):
    if not Path("pictures").is_dir():
        write_splits(Path("pictures"), 2, 2, 2)
        write_tiny_backbone(Path("images"))
    words = ["train", "--model", "images", "--data", "pictures", "--method", "linear", "--epochs", "1", "--output"]
    assert main([*words, "of-images"]) == 0
    assert "--votes is for point clouds" in fails(
        capsys, ["evaluate", "of-images", "--data", "pictures", "--votes", "2"]
    )
    assert "figures are drawn of point clouds" in fails(
        capsys, ["predict", "of-images", "pictures/test", "--output", "x.svg"]
    )


# ------------------------------------------------------------------ tune, compare
def test_tune(world):
    words = ["tune", *TRAIN[1:], "--method", "linear", "--epochs", "1", "--trials", "2", "--output", "search"]
    Path("space.yaml").write_text("sampler: grid\nspace: {cloud_augment: [none, rotate]}\n")
    assert main([*words, "--space", "space.yaml"]) == 0
    found = (world / "search/trials.csv").read_text()
    assert "none" in found
    assert "rotate" in found


STUDY = f"""\
title: Shells
backbones: {{model: {TINY}, label: tiny}}
methods: {{Linear: linear, Biases: bitfit}}
seeds: [0]
lr: 0.01
training: {{epochs: 2, batch_size: 8, warmup_epochs: 0, cloud_augment: rotate}}
"""


def test_compare_shows_clouds_as_examples(world, capsys):
    Path("study.yaml").write_text(STUDY)
    assert main(["compare", "study.yaml", "--data", "shells=clouds", "--output", "study"]) == 0
    pictures = sorted((world / "study/pictures/shells").glob("*.jpg"))
    assert len(pictures) == 6
    report = (world / "study/report.html").read_text()
    assert report.count("data:image/jpeg;base64,") == 6
    config = (world / "study/runs/tiny/shells/Linear/seed-0/config.yaml").read_text()
    assert "cloud_augment: rotate" in config
    Path("study.yaml").write_text(STUDY.replace("rotate", "turn"))
    assert "unknown augmentation of clouds 'turn'" in fails(
        capsys, ["compare", "study.yaml", "--data", "shells=clouds", "--output", "other"]
    )


# ------------------------------------------------------------------ demo
def test_the_demonstration_of_points(world, monkeypatch):
    from deltalens.data import solids

    monkeypatch.setattr(solids, "VAL_CLOUDS", 2)
    monkeypatch.setattr(solids, "TEST_CLOUDS", 3)
    words = ["--model", TINY, "--epochs", "1", "--train-images", "30", "--methods", "linear", "adaptformer", "full"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["demo", "--task", "points", *words, "--output", "demo"]) == 0
    content = json.loads((world / "demo/results.json").read_text())
    assert [run["method"] for run in content["runs"]] == ["Linear", "AdaptFormer", "Full"]
    assert content["test_images"] == 30
    page = (world / "demo/report.html").read_text()
    assert "Accuracy on 30 test clouds" in page
    assert page.count('alt="test cloud of class') == 10
    assert not list((world / "demo").glob("**/*.npy"))  # kept features are gone
    assert page.count("data:image/png;base64,") == 10
    assert not re.search(r"https?://", page)
    assert f"deltalens demo --task points --model {TINY}" in content["conditions"]["Command"]
    assert "Linear" in shown.getvalue()
    model = dl.from_pretrained(world / "demo/linear")
    test = solids.make_solids(30, 64).test
    from deltalens.data.inputs import set_inputs

    set_inputs(test, dl.preprocessing(model))
    with torch.no_grad():
        right = model(torch.stack([test[i][0] for i in range(30)])).argmax(1) == torch.tensor(test.labels)
    assert float(right.float().mean()) == pytest.approx(content["runs"][0]["accuracy"])
    assert load_file(world / "demo/adaptformer/adapter_model.safetensors")


def test_the_demonstration_wants_a_model_of_points(capsys):
    words = ["demo", "--task", "points", "--model", "deltalens/vit-mini", "--img-size", "32", "--output", "no"]
    assert "takes images: --task points needs a model of points" in fails(capsys, words)


# ------------------------------------------------------------------ analyze
def test_analyses_take_clouds(trained, capsys):
    words = ["--method", "adapter_x", "--epochs", "1", "--output", "with-experts"]
    assert main([*TRAIN, *words]) == 0
    capsys.readouterr()
    assert main(["analyze", "experts", "with-experts", "--data", "clouds", "--output", "experts.svg"]) == 0
    assert "15 clouds; drawn in experts.svg" in capsys.readouterr().out
    assert main(["analyze", "embeddings", "trained", "--data", "clouds", "--output", "embeddings.svg"]) == 0
    assert "15 clouds; drawn in embeddings.svg" in capsys.readouterr().out
    words = ["analyze", "attention", "trained", "--image", "clouds/test/flat/000.npy", "--output", "attention.svg"]
    assert "trained takes point clouds: see embeddings and experts" in fails(capsys, words)
