"""Several labels an image: loss, average precision, decoding, and the whole way from a table to predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from picture_folders import write_tiny_backbone
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

import deltalens as dl
from deltalens.cli.main import main
from deltalens.tasks import ClassificationTask, MultiLabelTask, task_class
from deltalens.tasks.average_precision import average_precision


def task(classes: int = 3, **options) -> MultiLabelTask:
    """A task whose model gives back what it is given: logits."""
    return MultiLabelTask(nn.Identity(), [f"c{i}" for i in range(classes)], **options)


# ------------------------------------------------------------------ loss
def test_the_loss_is_binary_cross_entropy_over_what_is_known():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.randint(-1, 2, (5, 3), dtype=torch.int8)
    known = [
        -torch.log(torch.sigmoid(z if y == 1 else -z))
        for z, y in zip(logits.flatten(), labels.flatten(), strict=True)
        if y >= 0
    ]
    result = task()((logits, labels))
    torch.testing.assert_close(result["loss"], torch.stack(known).mean())
    assert set(result["losses"]) == {"binary_cross_entropy"}
    assert task()((logits, torch.full((5, 3), -1)))["loss"] == 0


def test_smoothing_and_gradients_of_what_is_unknown():
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = task(2, label_smoothing=0.2)((logits, torch.tensor([[1, -1]])))["loss"]
    loss.backward()
    assert logits.grad.tolist() == [[pytest.approx(0.5 - 0.9), 0.0]]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(4,\), expected \(4, 3\): 1, 0 or -1"):
        task()((torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(
        ValueError,
        match="unknown task 'depth'; there are classification, multilabel, segmentation, detection, instance",
    ):
        task_class("depth")
    assert (task_class(None), task_class("multilabel")) == (ClassificationTask, MultiLabelTask)


# ------------------------------------------------------------------ average precision
def test_average_precision_is_scikit_learns():
    random = np.random.default_rng(0)
    scores = random.integers(0, 9, (60, 4)) / 9  # many equal scores
    labels = random.integers(-1, 2, (60, 4))
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    for column in range(4):
        known = labels[:, column] >= 0
        expected = average_precision_score(labels[known, column], scores[known, column])
        assert float(found[column]) == pytest.approx(expected, abs=1e-12)


def test_eleven_points_by_hand():
    """Right, wrong, right, wrong, wrong: precision 1 up to recall 1/2, 2/3 up to 1."""
    scores, labels = torch.tensor([[5.0, 4, 3, 2, 1]]).T, torch.tensor([[1, 0, 1, 0, 0]]).T
    assert float(average_precision(scores, labels)) == pytest.approx((1 + 2 / 3) / 2)
    assert float(average_precision(scores, labels, eleven_points=True)) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_metrics_over_batches_leave_out_classes_that_nobody_has():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 3), torch.randint(-1, 2, (20, 3), dtype=torch.int8)
    labels[:, 1] = labels[:, 1].clamp(max=0)
    each = task()
    metrics = each.new_metrics()
    for part in (slice(0, 7), slice(7, 20)):
        batch = (logits[part], labels[part])
        each.update_metrics(metrics, each(batch), batch)
    found = average_precision(logits, labels)
    assert torch.isnan(found).tolist() == [False, True, False]
    assert float(metrics.compute()["mAP"]) == pytest.approx(float((found[0] + found[2]) / 2))
    points = average_precision(logits, labels, eleven_points=True)
    assert float(metrics.compute()["mAP_voc07"]) == pytest.approx(float((points[0] + points[2]) / 2))
    per_class = each.per_class(metrics)
    assert list(per_class) == ["c0", "c1", "c2"]
    assert per_class["c2"] == pytest.approx(float(found[2]))


def test_decoding_gives_what_is_probable_enough():
    logits = torch.tensor([[2.0, -3.0, 0.5], [-1.0, -1.0, -1.0]])
    names = [[name for name, _ in row] for row in task().decode(logits)]
    assert names == [["c0", "c2"], []]
    assert task().decode(logits)[0][0][1] == pytest.approx(1 / (1 + np.exp(-2)))
    assert [len(row) for row in task().decode(logits, threshold=0.2)] == [2, 3]
    assert [len(row) for row in task().decode(logits, topk=1, threshold=0.2)] == [1, 1]


# ------------------------------------------------------------------ the whole way
@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pictures with a red half, a blue half, both or none, and a table of that."""
    root = tmp_path_factory.mktemp("several")
    write_tiny_backbone(root / "tiny")
    random = np.random.default_rng(0)
    lines = ["path,labels,split"]
    for i in range(48):
        red, blue = bool(i & 1), bool(i & 2)
        pixels = random.normal(110, 25, (32, 32, 3))
        pixels[:, :16, 0] += 120 * red
        pixels[:, 16:, 2] += 120 * blue
        Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(root / f"{i}.png")
        names = ";".join(name for name, there in (("red", red), ("blue", blue)) if there)
        lines.append(f"{i}.png,{names},{'train' if i < 32 else 'val' if i < 40 else 'test'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_train_evaluate_and_predict(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    words = "train --model tiny --data . --format csv --output run --method lora --lr 3e-2 --epochs 10 --batch-size 8"
    assert main([*words.split(), "--hflip", "0", "--min-crop", "1"]) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert results["test"]["mAP"] > 0.9
    assert 0 < results["test"]["mAP_voc07"] <= 1
    info = json.loads(Path("run/adapter_config.json").read_text())["info"]
    assert (info["task"], info["class_names"], info["split"]["format"]) == ("multilabel", ["blue", "red"], "csv")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["format"] == "csv"
    capsys.readouterr()
    assert main(["evaluate", "run", "--data", ".", "--output", "e.json"]) == 0
    measured = json.loads(Path("e.json").read_text())
    assert measured["mAP"] == pytest.approx(results["test"]["mAP"], abs=1e-6)
    assert measured["mAP"] == pytest.approx(sum(measured["per_class"].values()) / 2)
    assert "  blue" in capsys.readouterr().out
    words = ["predict", "run", "44.png", "47.png", "--format", "json", "--output", "p.json", "--threshold", "0.4"]
    assert main(words) == 0
    predicted = {entry["image"]: entry["predictions"] for entry in json.loads(Path("p.json").read_text())}
    assert {each["class"] for each in predicted["47.png"]} == {"red", "blue"}
    assert all(each["probability"] >= 0.4 for each in predicted["47.png"])
    capsys.readouterr()
    assert main(["predict", "run", "44.png", "--threshold", "0"]) == 0
    assert {"red", "blue"} <= set(capsys.readouterr().out.split())
    assert main(["analyze", "embeddings", "run", "--data", ".", "--output", "e.svg"]) == 1
    assert "needs one label an image" in capsys.readouterr().err


def test_a_study_chooses_by_mean_average_precision(world, tmp_path, monkeypatch):
    study = {
        "backbones": {"model": str(world / "tiny"), "label": "tiny"},
        "datasets": {"halves": {"path": str(world / "labels.csv"), "format": "csv"}},
        "methods": {"Linear": "linear"},
        "seeds": [0],
        "lr": {"relative": [1e-6, 1]},
        "training": {"epochs": 2, "batch_size": 16, "hflip": 0},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["compare", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]) == 0
    found = {f.parent.name: json.loads(f.read_text()) for f in (tmp_path / "out").rglob("results.json")}
    best = max((r for name, r in found.items() if name.startswith("lr-")), key=lambda r: r["val"]["mAP"])
    assert found["seed-0"]["settings"]["lr"] == best["settings"]["lr"]
    table = (tmp_path / "out/table.md").read_text()
    assert "test mAP" in table
    assert f"{100 * found['seed-0']['test']['mAP']:.1f}" in table
    assert "mAP" in (tmp_path / "out/runs.csv").read_text().splitlines()[1]


def test_prototypes_need_one_label(world):
    model = dl.create_backbone(str(world / "tiny"), num_classes=2)
    with pytest.raises(ValueError, match="class prototypes need one label an image"):
        dl.class_prototypes(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2, 2, dtype=torch.int8))])
