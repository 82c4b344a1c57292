"""Segmentation, detection and instances on the command line: train, resume, evaluate, predict, inspect, and errors."""

import csv
import json
from pathlib import Path

import dense_folders
import numpy as np
import pytest
import torch
import yaml
from detectors import SMALL
from picture_folders import write_tiny_backbone
from PIL import Image
from safetensors.torch import load_file

import deltalens as dl
from deltalens.cli import dense_options
from deltalens.cli.main import main
from deltalens.tasks import SegmentationTask

TRAIN = ["train", "--model", "tiny", "--epochs", "1", "--workers", "0", "--batch-size", "2"]
MASK_RCNN = {**SMALL["mask_rcnn"], "strides": [8, 16], "detections_per_image": 5, "score_threshold": 0.0}
RETINANET = {**SMALL["retinanet"], "strides": [8, 16], "detections_per_image": 5, "score_threshold": 0.0}
RUNS = {
    "segmentation": [*TRAIN, "--data", "masks", "--head", "fcn", "--head.channels", "8", "--head.convs", "1"],
    "detection": [
        *TRAIN,
        "--data",
        "voc",
        "--head",
        "retinanet",
        "--head-options",
        json.dumps(RETINANET),
        "--method",
        "bitfit",
    ],
    "instance": [*TRAIN, "--data", "coco", "--task", "instance", "--head-options", json.dumps(MASK_RCNN)],
}
RUNS["segmentation"] += [
    "--head.pyramid_channels",
    "8",
    "--method",
    "lora",
    "--method.r",
    "2",
    "--crop-size",
    "16",
    "--epochs",
    "2",
]
RUNS["instance"] += ["--method", "linear"]
CLASSES = {"segmentation": ["0", "1", "2"], "detection": ["cat", "dog"], "instance": ["ship", "tree"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny backbone, small data in three layouts, and a finished run on each, named as its task."""
    root = tmp_path_factory.mktemp("dense")
    write_tiny_backbone(root / "tiny")
    dense_folders.masked_pairs(root / "masks")
    dense_folders.voc(root / "voc", dense_folders.VOC_LISTS)
    dense_folders.coco(root / "coco")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for task, words in RUNS.items():
            assert main([*words, "--output", task]) == 0, task
    return root


@pytest.fixture(autouse=True)
def _in_world(world, monkeypatch):
    monkeypatch.chdir(world)


def said(capsys, argv: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1, captured.err
        return captured.err
    return captured.out


# ------------------------------------------------------------------ train
@pytest.mark.parametrize("task", RUNS)
def test_what_a_run_leaves_behind(task):
    config = yaml.safe_load(Path(task, "config.yaml").read_text())
    results = json.loads(Path(task, "results.json").read_text())
    assert config["task"] == task
    assert config["head"] == dense_options.HEADS[task][1 if task == "segmentation" else 0]
    assert config["lr"] <= dense_options.LEARNING_RATE[task]
    assert not ({"window", "crop_size"} & set(config)) or task == "segmentation"
    assert results["per_class"]["part"] == "test"
    assert list(results["per_class"]["classes"]) == CLASSES[task]
    further = ["nothing"] if task != "segmentation" else []
    assert results["confusion"]["classes"] == CLASSES[task] + further
    assert np.shape(results["confusion"]["counts"]) == (len(CLASSES[task]) + len(further),) * 2
    page = Path(task, "report.html").read_text()
    assert page.count("data:image/jpeg") == 4  # the truth of two pictures, and what was found
    assert all(f"<td>{name}</td>" in page for name in CLASSES[task])
    model = dl.from_pretrained(task)
    assert dl.class_names(model) == CLASSES[task]
    assert dl.adapter_info(model)["task"] == task


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(capsys, monkeypatch):
    calls = []

    def stopping(self, *args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        plain(self, *args)

    plain = SegmentationTask.update_metrics
    monkeypatch.setattr(SegmentationTask, "update_metrics", stopping)
    words = [word if word != "segmentation" else "stopped" for word in RUNS["segmentation"]]
    assert "--resume goes on" in said(capsys, [*words, "--output", "stopped"], code=130)
    monkeypatch.setattr(SegmentationTask, "update_metrics", plain)
    assert main(["train", "--output", "stopped", "--resume"]) == 0
    tensors, expected = (load_file(Path(run, "adapter_model.safetensors")) for run in ("stopped", "segmentation"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert "nothing to resume" in said(capsys, ["train", "--output", "stopped", "--resume"])


def test_the_crop_is_as_large_as_the_pictures_where_nothing_is_said(capsys):
    from deltalens.cli.dense_training import fitted_to_data
    from deltalens.data import read_data

    data = read_data("masks")
    assert fitted_to_data({"task": "segmentation", "crop_size": None}, data)["crop_size"] == 32  # 12, in steps of 32
    assert fitted_to_data({"task": "segmentation", "crop_size": 16}, data)["crop_size"] == 16


def test_head_words_are_gathered():
    words = ["--head", "upernet", "--head.channels", "64", "--head.norms=frozen", "--epochs", "2"]
    expected = ["--head", "upernet", "--epochs", "2", "--head-options", '{"channels": 64, "norms": "frozen"}']
    assert dense_options.translate(words) == expected


WRONG = {
    ("--data", "masks", "--label-smoothing", "0.1"): "--label-smoothing has no meaning for segmentation",
    ("--data", "masks", "--templates", "a {}"): "--templates has no meaning for segmentation",
    ("--data", "masks", "--cache-features", "kept"): "--cache-features has no meaning for segmentation",
    ("--data", "masks", "--head", "retinanet"): "masks is not laid out for detection; it is laid out for segmentation",
    (
        "--data",
        "masks",
        "--task",
        "segmentation",
        "--head",
        "retinanet",
    ): "'retinanet' is no head for segmentation (it is for detection), which has upernet, fcn",
    ("--data", "masks", "--head", "upernett"): "did you mean upernet?",
    ("--data", "masks", "--head.chanels", "8"): "has no option 'chanels'",
    ("--data", "masks", "--short-sides", "[160]"): "--short-sides is for detection, instance",
    ("--data", "masks", "--scale", "[2.0, 0.5]"): "--scale is two numbers, [smallest, largest]",
    ("--data", "masks", "--stride", "4"): "a stride of 4 needs a window",
    ("--data", "masks", "--task", "detection"): "masks is not laid out for detection; it is laid out for segmentation",
    ("--data", "coco"): "serves detection, instance: say which task (--task detection)",
    ("--data", "voc", "--task", "instance"): "is not laid out for instance",
    ("--data", "voc", "--crop-size", "64"): "--crop-size is for segmentation, and the task is classification",
    (
        "--data",
        "voc",
        "--task",
        "detection",
        "--crop-size",
        "64",
    ): "--crop-size is for segmentation, and the task is detection",
    ("--data", "nowhere", "--task", "detection"): "no data folder at nowhere",
    ("--data", "masks", "--model", "deltalens/clip-mini"): "needs a timm network that gives maps",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_has_no_meaning_is_an_error_in_one_line(words, capsys):
    start = ["train", *(() if "--model" in words else ("--model", "tiny")), "--output", "wrong"]
    assert WRONG[words] in said(capsys, [*start, *words], code=1)
    assert not Path("wrong").exists()


# ------------------------------------------------------------------ evaluate
@pytest.mark.parametrize("task", RUNS)
def test_evaluation_measures_what_the_run_did(task, capsys):
    data = RUNS[task][RUNS[task].index("--data") + 1]
    words = ["evaluate", task, "--data", data, "--output", "measured.json", "--report", "measured.html"]
    printed = said(capsys, words)
    measured, results = (
        json.loads(Path("measured.json").read_text()),
        json.loads(Path(task, "results.json").read_text()),
    )
    for name, value in results["test"].items():
        assert measured[name] == pytest.approx(value, abs=1e-5), name
    assert measured["per_class"] == results["per_class"]
    assert all(f"\n  {name} " in printed for name in CLASSES[task])
    assert Path("measured.html").read_text().count("<h2>") >= 4


def test_windows_and_views_of_segmentation(capsys):
    words = ["evaluate", "segmentation", "--data", "masks", "--output", "views.json"]
    said(capsys, [*words, "--window", "8", "--scales", "[1.0, 1.5]", "--flip", "true"])
    assert 0 <= json.loads(Path("views.json").read_text())["miou"] <= 1
    assert "--window is for segmentation" in said(
        capsys, ["evaluate", "detection", "--data", "voc", "--window", "8"], code=1
    )
    assert "--votes has no meaning for detection" in said(
        capsys, ["evaluate", "detection", "--data", "voc", "--votes", "2"], code=1
    )
    assert "expected in masks" in said(capsys, ["evaluate", "detection", "--data", "masks"], code=1)


# ------------------------------------------------------------------ predict
@pytest.mark.parametrize("task", ["detection", "instance"])
def test_coco_tools_read_what_was_found(task, capsys):
    from faster_coco_eval import COCO

    pictures = sorted(Path("coco/images").glob("t*.jpg"))[:3]
    words = ["predict", task, *map(str, pictures), "--threshold", "0", "--format", "coco", "--output", "found.json"]
    said(capsys, words)
    found = COCO("found.json")
    assert [image["file_name"] for image in found.loadImgs(found.getImgIds())] == list(map(str, pictures))
    assert [category["name"] for category in found.loadCats(found.getCatIds())] == CLASSES[task]
    annotations = found.loadAnns(found.getAnnIds())
    assert annotations
    model = dl.from_pretrained(task)
    assert {a["image_id"] for a in annotations} <= {1, 2, 3}
    for annotation in annotations:
        left, top, width, height = annotation["bbox"]
        assert min(left, top, width, height) >= 0
        assert left + width <= dense_folders.WIDTH + 1e-3
        if task == "instance":
            assert found.annToMask(annotation).shape == (dense_folders.HEIGHT, dense_folders.WIDTH)
            assert found.annToMask(annotation).sum() == annotation["area"]
    assert model.num_classes == 2
    found.loadRes(json.loads(Path("found.json").read_text())["annotations"])


def test_masks_are_palette_pictures_of_the_classes_found(capsys):
    assert "1 mask is in" in said(
        capsys, ["predict", "segmentation", "masks/images/test/test0.jpg", "--format", "masks", "--output", "drawn"]
    )
    mask = Image.open("drawn/test0.png")
    assert (mask.mode, mask.size) == ("P", (dense_folders.WIDTH, dense_folders.HEIGHT))
    assert Path("drawn/classes.txt").read_text() == "0\n1\n2\n"
    said(
        capsys, ["predict", "segmentation", "masks/images/test/test0.jpg", "--format", "csv", "--output", "shares.csv"]
    )
    rows = list(csv.DictReader(Path("shares.csv").read_text().splitlines()))
    counts = np.bincount(np.asarray(mask).reshape(-1), minlength=3)
    assert {row["class"]: float(row["share"]) for row in rows} == pytest.approx(
        {str(i): count / mask.width / mask.height for i, count in enumerate(counts) if count}, abs=1e-5
    )


@pytest.mark.parametrize("task", RUNS)
def test_pictures_and_tables(task, capsys):
    images = ["masks/images/test", "coco/images/test0.jpg"]
    start = ["predict", task, *images, "--threshold", "0.0"]
    assert said(capsys, start).count(".jpg") == 3
    said(capsys, [*start, "--output", "sheet.png"])
    assert Image.open("sheet.png").width > 1000
    said(capsys, [*start, "--format", "pictures", "--output", f"pictures-{task}"])
    names = sorted(file.name for file in Path(f"pictures-{task}").iterdir())
    assert names == ["test0-2.png", "test0.png", "test1.png"]
    entries = json.loads(said(capsys, [*start, "--format", "json"]))
    assert len(entries) == 3
    assert "classes" in entries[0] or "objects" in entries[0]


def test_what_is_left_out_and_not_found_is_said_beside_the_result(capsys, tmp_path):
    whole = Path("coco/images/test0.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole)
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    words = ["predict", "detection", str(tmp_path), "--format", "json", "--skip-broken", "true", "--threshold", "1"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert [entry["objects"] for entry in json.loads(captured.out)] == [[]]
    assert "left out 1 of 2 images" in captured.err
    assert "nothing has a score of 1 or more" in captured.err


def test_wrong_words_of_predict(capsys):
    start = ["predict", "segmentation", "masks/images/test"]
    assert "--format coco is for boxes" in said(capsys, [*start, "--format", "coco"], code=1)
    assert "give a folder, --output DIR" in said(capsys, [*start, "--format", "masks"], code=1)
    assert "--topk has no meaning" in said(capsys, [*start, "--topk", "2"], code=1)
    assert "no images at nothing" in said(capsys, ["predict", "detection", "nothing"], code=1)
    assert "between 0 and 1, got 2" in said(capsys, ["predict", "detection", "voc", "--threshold", "2"], code=1)


def test_inspect_shows_the_network_under_a_head(capsys):
    printed = said(
        capsys, ["inspect", "--model", "tiny", "--head", "fcn", "--head.channels", "8", "--method", "bitfit"]
    )
    assert "maps.backbone.blocks.0" in printed
    assert "head: " in printed
    assert "name one, such as --head upernet" in said(
        capsys, ["inspect", "--model", "tiny", "--head.channels", "8"], code=1
    )


# ------------------------------------------------------------------ tune
def test_a_search_is_judged_by_what_decides(capsys, tmp_path):
    words = [word if word != "train" else "tune" for word in RUNS["segmentation"]]
    words += ["--epochs", "1", "--trials", "2", "--output", str(tmp_path / "search")]
    assert "miou" in said(capsys, words)
    head = (tmp_path / "search/trials.csv").read_text().splitlines()[0]
    assert head.startswith("trial,state,miou,epochs,lr")
    best = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    assert (best["task"], best["head"], best["head_options"]["channels"], best["crop_size"]) == (
        "segmentation", "fcn", 8, 16,
    )  # fmt: skip
    results = json.loads(next((tmp_path / "search/trials").glob("*/results.json")).read_text())
    assert "miou" in results["val"]
    assert "test" not in results or not results["test"]  # searches do not look at it
    assert "--rand-augment has no meaning for segmentation" in said(capsys, [*words, "--rand-augment", "9"], code=1)
