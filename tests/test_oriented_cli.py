"""Oriented boxes on the command line: train, evaluate, predict in every format, drawn pictures, and errors."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from picture_folders import write_tiny_backbone
from PIL import Image

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.oriented_scenes import make_oriented_scenes
from deltalens.models.oriented_boxes import boxes_of
from deltalens.models.oriented_iou import oriented_iou
from deltalens.studies.dense_pictures import drawn_objects
from deltalens.tasks import Detection

HEAD = {
    "channels": 16, "anchor_scale": 2.0, "strides": [8, 16], "detections_per_image": 5, "score_threshold": 0.0,
}  # fmt: skip
TRAIN = [
    "train", "--head", "oriented_retinanet", "--model", "tiny", "--epochs", "1", "--workers", "0", "--batch-size", "2",
    "--method", "bitfit",
    "--head-options", json.dumps(HEAD),
]  # fmt: skip
NAMES = ["plane", "ship", "truck"]  # sorted, as the reader has them


def write_dota(root: Path) -> Path:
    """Generated scenes as DOTA's folders."""
    scenes = make_oriented_scenes(6, 64)
    for part, count in (("train", 6), ("test", 2)):  # val is drawn from train
        data = getattr(scenes, part)
        for folder in ("images", "labelTxt"):
            (root / part / folder).mkdir(parents=True)
        for i in range(count):
            data.image(i).save(root / part / "images" / f"{part}{i}.png")
            truth = data.truth(i)
            lines = [
                f"{' '.join(f'{side:.2f}' for side in corners)} {scenes.class_names[label]} {int(n == 3)}\n"
                for n, (corners, label) in enumerate(
                    zip(truth["corners"].flatten(1).tolist(), truth["labels"].tolist(), strict=True)
                )
            ]
            (root / part / "labelTxt" / f"{part}{i}.txt").write_text("imagesource:none\ngsd:1\n" + "".join(lines))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny backbone, data as DOTA's, and a finished run."""
    root = tmp_path_factory.mktemp("oriented")
    write_tiny_backbone(root / "tiny")
    write_dota(root / "dota")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert (
            main([*TRAIN, "--data", "dota", "--rotation", "0.5", "--flips", "[0.2, 0.2, 0.1]", "--output", "run"]) == 0
        )
    return root


@pytest.fixture(autouse=True)
def _in_world(world, monkeypatch):
    monkeypatch.chdir(world)


def said(capsys, argv: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_what_a_run_leaves_behind():
    config = yaml.safe_load(Path("run", "config.yaml").read_text())
    results = json.loads(Path("run", "results.json").read_text())
    assert (config["task"], config["head"], config["rotation"]) == ("oriented", "oriented_retinanet", 0.5)
    assert config["flips"] == [0.2, 0.2, 0.1]
    assert set(results["test"]) >= {"map50_voc07", "map50_voc", "map75", "map"}
    assert list(results["per_class"]["classes"]) == NAMES
    assert "AP50, VOC 2007" in results["per_class"]["classes"]["ship"]
    assert results["confusion"]["classes"] == [*NAMES, "nothing"]
    page = Path("run", "report.html").read_text()
    assert page.count("data:image/jpeg") == 4  # the truth of two pictures, and what was found
    assert "AP, IoU .5 to .95" in page
    assert "bitfit on tiny: oriented boxes" in page
    assert dl.adapter_info(dl.from_pretrained("run"))["task"] == "oriented"


def test_evaluation_measures_what_the_run_did(capsys):
    words = ["evaluate", "run", "--data", "dota", "--output", "measured.json", "--report", "measured.html"]
    printed = said(capsys, words)
    measured = json.loads(Path("measured.json").read_text())
    results = json.loads(Path("run", "results.json").read_text())
    for name, value in results["test"].items():
        assert measured[name] == pytest.approx(value, abs=1e-5), name
    assert measured["per_class"] == results["per_class"]
    assert all(f"\n  {name} " in printed for name in NAMES)
    assert Path("measured.html").read_text().count("<h2>") >= 4


# ------------------------------------------------------------------ predict
PREDICT = ["predict", "run", "dota/test/images", "--threshold", "0"]


def test_all_formats_say_the_same(capsys):
    rows = list(csv.DictReader(said(capsys, [*PREDICT, "--format", "csv"]).splitlines()))
    entries = json.loads(said(capsys, [*PREDICT, "--format", "json"]))
    assert [Path(each["image"]).name for each in entries] == ["test0.png", "test1.png"]
    objects = [one for each in entries for one in each["objects"]]
    assert len(rows) == len(objects) == 10
    for row, one in zip(rows, objects, strict=True):
        box, corners = one["oriented"], np.array(one["corners"])
        assert row["class"] == one["class"]
        assert [float(row[name]) for name in box] == pytest.approx(list(box.values()), abs=0.006)
        assert [float(row[f"{axis}{i}"]) for i in range(1, 5) for axis in "xy"] == pytest.approx(
            corners.reshape(-1).tolist(), abs=0.006
        )
        assert -90 <= box["angle_degrees"] < 90
        again = boxes_of(torch.tensor(corners))
        assert again[:4].tolist() == pytest.approx([box[name] for name in ("cx", "cy", "w", "h")], abs=1e-3)
        assert abs(math.sin(float(again[4]) - math.radians(box["angle_degrees"]))) < 1e-3 or box["w"] - box["h"] < 1e-2
        assert one["box"] == pytest.approx([*corners.min(0), *corners.max(0)], abs=1e-3)
    for ending in ("csv", "json"):  # which says the format
        said(capsys, [*PREDICT, "--output", f"found.{ending}"])
        assert Path(f"found.{ending}").read_text() == said(capsys, [*PREDICT, "--format", ending])
    table = said(capsys, PREDICT).splitlines()
    assert [line.split() for line in table if "degrees" in line] == [
        ["class", "score", "cx", "cy", "w", "h", "degrees"]
    ] * 2
    assert len(table) == 10 + 2 * 2
    assert float(table[2].split()[-1]) == pytest.approx(objects[0]["oriented"]["angle_degrees"], abs=0.06)


def test_dota_files_are_read_back(capsys):
    printed = said(capsys, [*PREDICT, "--format", "dota", "--output", "server"])
    assert "what was found in 2 images is in server/Task1_*.txt" in printed
    assert sorted(file.name for file in Path("server").iterdir()) == [f"Task1_{name}.txt" for name in NAMES]
    entries = json.loads(said(capsys, [*PREDICT, "--format", "json"]))
    expected = {(Path(each["image"]).stem, one["class"], one["score"], *np.reshape(one["corners"], -1))
                for each in entries for one in each["objects"]}  # fmt: skip
    found = set()
    for name in NAMES:
        for line in Path(f"server/Task1_{name}.txt").read_text().splitlines():
            image, *numbers = line.split()
            found.add((image, name, *map(float, numbers)))
    assert len(found) == 10
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=0.011)


def test_two_pictures_of_one_name_are_an_error(capsys, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "P1.png")
    words = ["predict", "run", str(tmp_path), "--format", "dota", "--output", str(tmp_path / "out")]
    assert "both called P1" in said(capsys, words, code=1)
    assert not (tmp_path / "out").exists()


def test_pictures(capsys):
    said(capsys, [*PREDICT, "--output", "sheet.png"])
    assert Image.open("sheet.png").width > 500
    said(capsys, [*PREDICT, "--format", "pictures", "--output", "pictures"])
    assert sorted(file.name for file in Path("pictures").iterdir()) == ["test0.png", "test1.png"]


def test_large_pictures_are_looked_at_by_tiles(capsys):
    """One tile as large as the pictures is the plain evaluation; smaller ones find more, each object once."""
    whole = ["evaluate", "run", "--data", "dota", "--output", "tiles.json"]
    plain = said(capsys, whole)
    assert said(capsys, [*whole, "--tile", "64", "--gap", "0"]) == plain
    said(capsys, [*whole, "--tile", "48", "--gap", "32", "--report", "tiles.html"])
    assert json.loads(Path("tiles.json").read_text())["tiles"] == {"size": 48, "gap": 32}
    assert "--tile 48 --gap 32" in Path("tiles.html").read_text()
    entries = json.loads(said(capsys, [*PREDICT, "--format", "json"]))
    assert json.loads(said(capsys, [*PREDICT, "--format", "json", "--tile", "64", "--gap", "9"])) == entries
    tiled = json.loads(said(capsys, [*PREDICT, "--format", "json", "--tile", "48", "--gap", "32"]))
    found = tiled[0]["objects"]
    assert 5 < len(found) <= 5 * 4
    assert max(one["oriented"]["cx"] for one in found) > 32  # of tiles at the right, in the picture's pixels
    boxes = torch.tensor([[one["oriented"][name] for name in ("cx", "cy", "w", "h", "angle_degrees")] for one in found])
    boxes[:, 4] = torch.deg2rad(boxes[:, 4])
    names = [one["class"] for one in found]
    for i, j in torch.triu(oriented_iou(boxes, boxes) > 0.1, 1).nonzero().tolist():
        assert names[i] != names[j]


def test_pictures_beyond_pillows_limit_are_read_by_tiles(capsys, monkeypatch):
    """DOTA has pictures of 800 million pixels; Pillow reads no more than twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    words = [*PREDICT[:2], "dota/test/images/test0.png", "--threshold", "0"]
    assert "exceeds limit" in said(capsys, words, code=1)
    assert "test0.png  " in said(capsys, [*words, "--tile", "64", "--gap", "9"])
    assert "images               2 (test)" in said(
        capsys, ["evaluate", "run", "--data", "dota", "--tile", "64", "--gap", "9"]
    )
    assert Image.MAX_IMAGE_PIXELS == 2000


def test_boxes_are_drawn_as_they_lie():
    """A bar of 60 x 20 at 30 degrees: its four edges are drawn, the corners of the upright box are not."""
    box = (50.0, 50.0, 60.0, 20.0, math.pi / 6)
    one = Detection("ship", 1.0, (0, 0, 100, 100), None, box)
    plain = Image.new("RGB", (100, 100), (90, 90, 90))
    picture = np.asarray(drawn_objects(plain, [one], ["ship"]))[:480, :480].astype(int)
    changed = (np.abs(picture - 90) > 40).any(-1)
    scale = 4.8
    along, across = np.array([math.cos(math.pi / 6), 0.5]), np.array([-0.5, math.cos(math.pi / 6)])
    for place in (30 * along, -30 * along, 10 * across, -10 * across):
        x, y = ((50 + place) * scale).round().astype(int)
        assert changed[y - 3 : y + 4, x - 3 : x + 4].any()
    for place in ((20, 25), (80, 75), (20, 75), (50, 50)):
        x, y = (np.array(place) * scale).round().astype(int)
        assert not changed[y - 8 : y + 9, x - 8 : x + 9].any()


# ------------------------------------------------------------------ errors
WRONG = {
    ("--data", "dota", "--head", "retinanet"): "is not laid out for detection; it is laid out for oriented (dota)",
    ("--data", "dota", "--task", "oriented", "--head", "retinanet"): (
        "'retinanet' is no head for oriented (it is for detection), which has oriented_rcnn, oriented_retinanet, "
        "h2rbox_v2"
    ),
    ("--data", "dota", "--task", "detection"): "dota is not laid out for detection; it is laid out for oriented",
    ("--data", "dota", "--task", "oriented", "--crop-size", "64"): "--crop-size is for segmentation",
    ("--data", "dota", "--task", "oriented", "--flips", "[0.5, 0.5, 0.5]"): "flips are three probabilities",
    ("--data", "dota", "--task", "oriented", "--hflip", "0"): "hflip has no meaning for images with oriented boxes",
    ("--data", "nowhere", "--task", "oriented"): "no data folder at nowhere",
    (
        "--data",
        "dota",
        "--task",
        "detection",
        "--rotation",
        "1",
    ): "--rotation is for oriented, and the task is detection",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_has_no_meaning_is_an_error_in_one_line(words, capsys):
    message = said(capsys, ["train", "--model", "tiny", "--output", "wrong", *words], code=1)
    assert WRONG[words] in message
    assert not Path("wrong").exists()


def test_wrong_words_of_predict_and_evaluate(capsys):
    assert "oriented is written by --format dota" in said(capsys, [*PREDICT, "--format", "coco"], code=1)
    assert "a file for each class: give a folder" in said(capsys, [*PREDICT, "--format", "dota"], code=1)
    assert "--gap is what tiles share" in said(capsys, [*PREDICT, "--gap", "8"], code=1)
    assert "share 200 pixels by default" in said(capsys, [*PREDICT, "--tile", "64"], code=1)
    assert "a gap below the size" in said(capsys, [*PREDICT, "--tile", "64", "--gap", "64"], code=1)
    assert "a size from 1 pixel" in said(capsys, [*PREDICT, "--tile", "0"], code=1)


def test_difficult_objects_alone_are_nothing_to_train_on(capsys, tmp_path):
    shutil.copytree("dota", tmp_path / "hard")
    for file in (tmp_path / "hard").glob("train/labelTxt/*.txt"):
        lines = [line if ":" in line else f"{line[:-1]}1" for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines))
    words = [*TRAIN, "--data", str(tmp_path / "hard"), "--output", str(tmp_path / "run")]
    assert "objects of the training pictures are marked as difficult" in said(capsys, words, code=1)
    assert not (tmp_path / "run").exists()
    said(capsys, [*words, "--difficult", "true", "--report", "false"])
    assert "--window is for segmentation" in said(capsys, [*PREDICT, "--window", "8"], code=1)
