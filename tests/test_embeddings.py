"""Embeddings are what the head reads, and their numbers are right; `deltalens analyze` prints them."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from models import images, randomize_adapter, tiny_swin, tiny_vit
from picture_folders import CLASSES, write_splits, write_tiny_backbone

import deltalens as dl
from deltalens.cli.main import main
from deltalens.studies.embeddings import embed, head_inputs, knn_accuracy, plane, plot_embeddings, silhouette


def batches(count: int = 3):
    return [(images("vit", batch=4, seed=i), torch.tensor([0, 1, 2, i])) for i in range(count)]


@pytest.mark.parametrize("config", [dl.MonaConfig(bottleneck=4), dl.VPTConfig(num_tokens=3), dl.BitFitConfig()])
def test_features_are_those_before_the_head(config):
    model = randomize_adapter(dl.attach(tiny_vit(), config)).eval()
    features, labels = head_inputs(model, batches())
    x = torch.cat([each for each, _ in batches()])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 1, 0, 1, 2, 2]
    assert not model.get_classifier()._forward_pre_hooks


def test_prompts_that_a_swin_head_pools_are_in_the_features():
    """forward_features gives the map alone; the head reads map and prompts."""
    model = randomize_adapter(dl.attach(tiny_swin(), dl.VPTConfig(num_tokens=3))).eval()
    features, _ = head_inputs(model, batches())
    x = torch.cat([each for each, _ in batches()])
    with torch.no_grad():
        logits, without = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(torch.from_numpy(features)), logits, rtol=1e-4, atol=1e-5)
    assert (torch.from_numpy(features) - without).abs().max() > 1e-2


def test_nearest_neighbours_by_hand():
    line = np.array([[0.0], [1.0], [2.1], [10.0], [11.0], [12.1], [2.9]])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    # each point's nearest other has its class, but for 2.1 -> 2.9 and 2.9 -> 2.1
    assert knn_accuracy(line, labels, 1) == pytest.approx(5 / 7)
    # of two neighbours of different classes the nearer one counts: the same answers
    assert knn_accuracy(line, labels, 2) == pytest.approx(5 / 7)
    # 2.1 has 2.9, 1, 0 now: right; 2.9 has 2.1, 1, 0: wrong; 10 has 11, 12.1, 2.9: right
    assert knn_accuracy(line, labels, 3) == pytest.approx(6 / 7)
    assert knn_accuracy(line, np.zeros(7, int)) == 1


def test_silhouette():
    features = np.array([[0.0], [1.0], [10.0], [11.0]])
    labels = np.array([0, 0, 1, 1])
    outer, inner = 1 - 1 / 10.5, 1 - 1 / 9.5
    assert silhouette(features, labels) == pytest.approx((outer + inner) / 2)
    assert silhouette(features, labels[::-1].copy()) == pytest.approx((outer + inner) / 2)
    assert silhouette(features, np.array([0, 1, 0, 1])) < 0
    assert math.isnan(silhouette(features, np.zeros(4, int)))
    assert math.isnan(silhouette(features, np.arange(4)))


def test_the_plane_keeps_clusters_and_its_seed():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 15)
    features = (random.normal(size=(45, 16)) + 12 * np.eye(16)[labels]).astype(np.float32)
    points = plane(features, seed=1)
    assert points.shape == (45, 2)
    assert knn_accuracy(points, labels) == 1
    assert np.array_equal(points, plane(features, seed=1))
    assert plane(features[:4]).shape == (4, 2)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        plane(features[:3])


def test_the_figure(tmp_path):
    model = tiny_vit()
    found = [embed(name, model, batches()) for name in ("one", "two")]
    assert np.array_equal(found[0].points, found[1].points)
    plot_embeddings(found, ["red", "green", "blue"], tmp_path / "plane.svg")
    root = ElementTree.parse(tmp_path / "plane.svg").getroot()
    groups = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("PathCollection")]
    points = [sum(1 for _ in group.iter("{http://www.w3.org/2000/svg}use")) for group in groups]
    assert sum(points[:6]) == 2 * 12  # three classes in two panels


# ------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, and adapters of a tiny backbone: three VPT sets, LoRA."""
    folder = tmp_path_factory.mktemp("analyses")
    write_splits(folder / "photos", train=2, val=2, test=8)
    write_tiny_backbone(folder / "model")
    methods = {f"vpt{i}": dl.VPTConfig(num_tokens=3) for i in range(3)} | {"lora": dl.LoRAConfig(r=2)}
    for seed, (name, config) in enumerate(methods.items()):
        model = dl.create_backbone(str(folder / "model"), num_classes=3)
        randomize_adapter(dl.attach(model, config), seed)
        dl.adapter_info(model)["class_names"] = sorted(CLASSES)
        dl.save_pretrained(model, folder / name)
    return folder


def accuracy(place, name) -> float:
    file = place / f"{name}.json"
    assert main(["evaluate", str(place / name), "--data", str(place / "photos"), "--output", str(file)]) == 0
    return json.loads(file.read_text())["accuracy"]


def test_ensemble_command(place, capsys):
    folders = [str(place / f"vpt{i}") for i in range(3)]
    words = ["analyze", "ensemble", *folders, "--data", str(place / "photos"), "--output", str(place / "e.json")]
    assert main([*words, "--batch-size", "5"]) == 0
    found = json.loads((place / "e.json").read_text())
    assert found["images"] == 24
    alone = {folder: accuracy(place, folder) for folder in folders}
    assert {name: found["accuracy"][name] for name in folders} == pytest.approx(alone)
    assert len(set(alone.values())) > 1
    assert main(["analyze", "ensemble", folders[0], "--data", str(place / "photos"), "--output", str(place / "1")]) == 0
    one = json.loads((place / "1").read_text())["accuracy"]
    assert one["ensemble"] == one[folders[0]]
    capsys.readouterr()
    assert main(["analyze", "ensemble", folders[0], str(place / "lora"), "--data", str(place / "photos")]) == 1
    assert "only adapters of prompts alone" in capsys.readouterr().err


def test_embeddings_command(place, capsys):
    folders = [str(place / name) for name in ("vpt0", "lora")]
    output = place / "embeddings.svg"
    words = ["analyze", "embeddings", *folders, "--data", str(place / "photos"), "--output", str(output)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["(vpt)", "(lora)"]
    assert lines[-1].startswith("24 images")
    assert output.is_file()
    assert main([*words, "--images", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 images")


def test_attention_command(place, capsys):
    picture = next((place / "photos/test/red").iterdir())
    output = place / "attention.png"
    words = ["analyze", "attention", str(place / "vpt0"), "--image", str(picture), "--block", "1"]
    assert main([*words, "--output", str(output)]) == 0
    arrays = np.load(output.with_suffix(".npz"))
    assert arrays["weights"].shape == (3, 17, 20)
    np.testing.assert_allclose(arrays["weights"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(arrays["over_prompts"], arrays["weights"][:, 0, :3])
    shares = [float(part.split()[1]) for part in capsys.readouterr().out.splitlines()[0].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embeddings", "a"], "deltalens analyze embeddings needs --data and --output"),
        (["attention", "a", "--output", "x.svg"], "deltalens analyze attention needs --image"),
        (["ensemble", "a"], "deltalens analyze ensemble needs --data"),
        (["embeddings", "a", "--data", "d", "--output", "x.jpg"], ".svg, .png, .pdf"),
        (["attention", "a", "b", "--image", "i", "--output", "x.svg"], "attention takes one adapter, got 2"),
        (["embeddings", "a", "--data", "d", "--output", "x.svg", "--images", "0"], "--images must be at least 1"),
    ],
)
def test_wrong_words(words, said, capsys):
    assert main(["analyze", *words]) == 1
    assert said in capsys.readouterr().err
