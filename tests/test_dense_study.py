"""`deltalens compare` for dense tasks: a study of scenes in a folder, tables with the right metric, bad input."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.scenes import make_scenes
from deltalens.studies.main_metrics import metric_of, metric_words, score
from deltalens.studies.study_reader import read_study

STUDY = """\
title: Scenes
task: segmentation
head: fcn
head_options: {channels: 16}
backbones: {model: deltalens/swin-mini, label: mini, img_size: 64}
methods:
  Head only: linear
  LoRA: {method: lora, r: 2}
seeds: [0]
training:
  epochs: 1
  batch_size: 4
  warmup_epochs: 0
  dense: {crop_size: 64, scale: [1.0, 1.0], max_class_share: 1.0, photometric: false, auxiliary_weight: 0.2}
lr: 1e-3
"""


def write_scenes(root):
    """Pictures and masks of a few generated scenes, and the names of the classes."""
    scenes = make_scenes(4, 64)
    for part in ("train", "val", "test"):
        found = getattr(scenes, part)
        for i in range(4):
            for kind, pixels in (("images", np.asarray(found.image(i))), ("masks", found.truth(i).numpy())):
                file = root / kind / part / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    (root / "classes.txt").write_text("\n".join(scenes.class_names) + "\n")
    return root


def test_a_study_of_segmentation(tmp_path):
    scenes, file, output = write_scenes(tmp_path / "scenes"), tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(STUDY)
    assert main(["compare", str(file), "--output", str(output), "--data", f"scenes={scenes}"]) == 0
    rows = list(csv.DictReader((output / "runs.csv").open()))
    assert [(row["method"], row["status"], row["metric"]) for row in rows] == [
        ("Head only", "finished", "miou"),
        ("LoRA", "finished", "miou"),
    ]
    table = (output / "table.md").read_text()
    assert "test mIoU" in table
    assert "Segmentation under fcn" in table
    assert "top-1" not in table
    for row in rows:
        results = json.loads((output / row["folder"] / "results.json").read_text())
        assert results["main_metric"] == "miou"
        assert float(row["test_accuracy"]) == results["test"]["miou"]
        assert f"{100 * results['test']['miou']:.1f}" in table
        model = dl.from_pretrained(output / row["folder"])
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 7, 64, 64)
    lora = json.loads((output / rows[1]["folder"] / "results.json").read_text())
    assert lora["parameters"]["head"] == json.loads((output / rows[0]["folder"] / "results.json").read_text())[
        "parameters"]["head"]  # fmt: skip
    assert main(["compare", str(file), "--output", str(output), "--data", f"scenes={scenes}"]) == 0  # all is done


def test_what_runs_are_compared_by():
    assert metric_of({"miou": 0.5, "pixel_accuracy": 0.9}) == "miou"
    assert metric_of({"map": 0.3, "map50_voc07": 0.6}, "map50_voc07") == "map50_voc07"
    assert score({"map": 0.3, "mask_map": 0.2, "map50_voc07": 0.6}) == 0.2
    assert score({"loss": 1.0}) is None
    assert metric_words(["miou", "miou", None]) == "mIoU"
    assert metric_words([]) == "accuracy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("task: segmentation", "task: segmentatoin"), "a study with a head needs a task"),
        (("head: fcn", "head: fnc"), "needs a head"),
        (("head: fcn\n", ""), "needs a head"),
        (("crop_size: 64", "crop_size: 0"), "numbers of pixels from 1"),
        (("crop_size: 64", "cropsize: 64"), "cropsize"),
    ],
)
def test_bad_fields_are_named(change, message, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace(*change))
    with pytest.raises(ValueError, match=message):
        read_study(file, {"scenes": str(tmp_path)})


def test_a_row_may_have_other_settings_of_the_head(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("r: 2}", "r: 2, backbone: {head_options: {channels: 32}}}"))
    study = read_study(file, {"scenes": str(tmp_path)})
    assert study.backbones[0].options == {"head": "fcn", "head_options": {"channels": 16}}
    assert study.variants[1].backbone == {"head_options": {"channels": 32}}
    assert study.training.augmentation.dense.crop_size == 64
    assert study.training.augmentation.dense.scale == (1.0, 1.0)
