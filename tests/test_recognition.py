"""Telling datasets apart by the features of each stage: the procedure, its files, and `deltalens analyze layers`."""

import csv
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hub_cache import write_open_clip, write_transformers, write_words
from models import randomize_adapter
from picture_folders import write_pictures, write_tiny_backbone

import deltalens as dl
from deltalens.cli.main import main
from deltalens.studies import recognition as procedure
from deltalens.studies.layer_features import Stages
from deltalens.studies.recognition import Draws, StageAccuracy, held_out_accuracy, recognition
from deltalens.studies.recognition_output import stages_in_order, to_csv, to_table


# ------------------------------------------------------------------ the procedure
def test_draws_are_disjoint_alike_for_all_datasets_and_of_their_seed():
    draws = Draws((40, 25), 20, (0, 1, 5), rows=3)
    assert draws.held_out == 6
    for seed in draws.seeds:
        for size, (learnt, held) in zip(draws.sizes, draws.parts(seed), strict=True):
            assert (len(learnt), len(held)) == (14, 6)
            assert len({*learnt, *held}) == 20
            assert max(*learnt, *held) < size
    assert [[*a] for a, _ in draws.parts(0)] == [[*a] for a, _ in Draws((40, 25), 20, (0,)).parts(0)]
    assert [*draws.parts(0)[0][1]] != [*draws.parts(1)[0][1]]
    learnt, of_learnt, held, of_held = draws.rows_of(1)
    units = np.concatenate([100 * i + units for i, units in enumerate(draws.units)])
    for rows, labels, side in ((learnt, of_learnt, 0), (held, of_held, 1)):
        wanted = [100 * i + parts[side] for i, parts in enumerate(draws.parts(1))]
        assert units[rows // 3].tolist() == np.repeat(np.concatenate(wanted), 3).tolist()
        assert (units[rows // 3] // 100).tolist() == labels.tolist()
    assert not {*learnt // 3} & {*held // 3}  # whole units


def stages_of(draws, rows_of_unit):
    """Stages whose rows are f(dataset, unit, row)."""
    made = [
        [
            rows_of_unit(i, unit, row)
            for i, units in enumerate(draws.units)
            for unit in units
            for row in range(draws.rows)
        ]
    ]
    return Stages("text", ("only",), tuple(np.array(rows, "float32") for rows in made))


def test_plain_differences_are_recognised_and_noise_is_not():
    random = np.random.default_rng(0)
    draws = Draws((200, 220, 240), 150, (0, 1, 2))
    (apart,) = recognition(stages_of(draws, lambda i, *_: random.normal(i, 0.2, 8)), draws)
    (alike,) = recognition(stages_of(draws, lambda *_: random.normal(0, 1, 8)), draws)
    assert apart.mean > 0.97
    assert abs(alike.mean - 1 / 3) < 0.09
    assert (apart.learnt, apart.held_out) == (3 * 105, 3 * 45)
    assert len(set(alike.accuracies)) > 1


def test_random_labels_stay_near_chance():
    """Features of plainly different datasets, whose samples are dealt out anew."""
    random = np.random.default_rng(1)
    features = np.concatenate([random.normal(3 * i, 1, (150, 16)) for i in range(4)])
    labels = np.repeat(np.arange(4), 150)
    order, dealt = random.permutation(600), random.permutation(labels)
    learnt, held = order[:420], order[420:]
    assert held_out_accuracy(features[learnt], labels[learnt], features[held], labels[held]) > 0.95
    assert abs(held_out_accuracy(features[learnt], dealt[learnt], features[held], dealt[held]) - 0.25) < 0.1


def test_classes_are_held_out_whole():
    """Features that tell the class and nothing of the dataset: texts of a class on both sides would be recognised."""
    random = np.random.default_rng(0)
    own = random.normal(0, 1, (2, 60, 64))
    draws = Draws((60, 60), 60, (0, 1, 2), rows=7)
    (found,) = recognition(stages_of(draws, lambda i, unit, row: own[i, unit] + random.normal(0, 0.01, 64)), draws)
    assert abs(found.mean - 0.5) < 0.15


def test_what_is_constant_but_for_rounding_tells_nothing():
    draws = Draws((60, 60), 60, (0, 1))
    (found,) = recognition(stages_of(draws, lambda i, *_: 3 + 1e-6 * np.full(4, i)), draws)
    assert found.accuracies == (0.5, 0.5)


def test_scales_do_not_matter():
    random = np.random.default_rng(0)
    draws = Draws((80, 80), 80, (0,))
    scale = 10.0 ** np.arange(-2, 4)
    made = {i: random.normal(i * np.array([1, 0, 0, 0, 0, 0]), 0.3, (80, 6)) for i in range(2)}
    plain, scaled = (
        recognition(stages_of(draws, lambda i, unit, _, by=by: made[i][unit] * by + 5 * by), draws)[0].mean
        for by in (np.ones(6), scale)
    )
    assert plain == scaled > 0.85


def test_wrong_draws():
    with pytest.raises(ValueError, match="two or more are needed, got 1"):
        Draws((10,), 5, (0,))
    with pytest.raises(ValueError, match="2 to 4 can"):
        Draws((4, 9), 5, (0,))
    with pytest.raises(ValueError, match="no seed"):
        Draws((4, 9), 4, ())
    with pytest.raises(ValueError, match="features of 8 samples are wanted, got 3"):
        recognition(Stages("vision", ("1",), (np.zeros((3, 2)),)), Draws((4, 4), 4, (0,)))
    assert Draws((2, 2), 2, (0,)).held_out == 1


# ------------------------------------------------------------------ files
FOUND = [
    StageAccuracy("vision", "embed", (0.25, 0.25), 28, 12),
    *(StageAccuracy("vision", str(i + 1), (0.5, 0.7), 28, 12) for i in range(11)),
    StageAccuracy("vision", "proj", (1.0, 0.9), 28, 12),
    StageAccuracy("text", "embed", (0.5, 0.5), 28, 12),
    StageAccuracy("text", "1", (0.6, 0.7), 28, 12),
    StageAccuracy("text", "proj", (1.0, 1.0), 28, 12),
]


def test_csv_and_table():
    assert stages_in_order(FOUND) == ["embed", *map(str, range(1, 12)), "proj"]
    rows = list(csv.DictReader(to_csv(FOUND, (0, 7), 4).splitlines()))
    assert list(rows[0]) == ["tower", "stage", "mean", "std", "seed_0", "seed_7", "chance", "learnt", "held_out"]
    assert [row["tower"] for row in rows] == ["vision"] * 13 + ["text"] * 3
    assert rows[1] == {
        "tower": "vision", "stage": "1", "mean": "0.600000", "std": "0.141421", "seed_0": "0.500000",
        "seed_7": "0.700000", "chance": "0.250000", "learnt": "28", "held_out": "12",
    }  # fmt: skip
    one = list(csv.DictReader(to_csv([StageAccuracy("vision", "1", (0.5,), 2, 2)], (0,), 2).splitlines()))
    assert one[0]["std"] == ""
    lines = to_table(FOUND).splitlines()
    assert lines[0].split() == ["stage", "vision,", "%", "text,", "%"]
    assert lines[2].split() == ["1", "60.0", "±", "14.1", "65.0", "±", "7.1"]
    assert lines[3].split() == ["2", "60.0", "±", "14.1"]


# ------------------------------------------------------------------ the command
WARM = {f"a very warm colour {i}": (200, 40 + 5 * i, 40) for i in range(8)}
COLD = {f"cold{i}": (40, 60 + 5 * i, 200) for i in range(8)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small random CLIPs and a ViT in folders, three datasets of which two are alike, and an adapter of both towers."""
    root = tmp_path_factory.mktemp("world")
    write_open_clip(root / "open_clip", depth=2)
    write_transformers(root / "transformers", "clip")
    write_words(root / "transformers", "a photo very warm colour cold of 1 2 3 4 5 6 7")
    write_tiny_backbone(root / "tiny")
    for i, (name, classes) in enumerate({"warm": WARM, "cold": COLD, "cold2": COLD}.items()):
        write_pictures(root / name, 8, seed=i, classes=classes)
    model = dl.create_backbone(str(root / "open_clip"), class_names=["red", "green"])
    randomize_adapter(dl.attach(model, dl.MMAConfig(start=2, bottleneck=4, alpha=1.0)))
    dl.save_pretrained(model, root / "adapter")
    return root


def analyze(world, model, output, *words, data=("warm", "cold")):
    given = [word for name in data for word in ("--data", f"{name}={world / name}")]
    models = [str(world / model)] if model == "adapter" else ["--model", str(world / model)]
    return main(["analyze", "layers", *models, *given, "--output", str(output), "--images", "30", *words])


def rows_of(output):
    with open(output.with_suffix(".csv"), newline="") as file:
        return {(row["tower"], row["stage"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("model", ["open_clip", "transformers"])
def test_both_towers_of_a_clip(model, world, tmp_path, capsys):
    output = tmp_path / "layers.svg"
    assert analyze(world, model, output) == 0
    rows = rows_of(output)
    blocks = {"open_clip": 2, "transformers": 3}[model]
    stages = ["embed", *(str(i + 1) for i in range(blocks)), "proj"]
    assert list(rows) == [(tower, stage) for tower in ("vision", "text") for stage in stages]
    assert float(rows["vision", "embed"]["mean"]) == 0.5  # the class token before it has seen the image
    for tower in ("vision", "text"):
        assert float(rows[tower, "1"]["mean"]) > 0.9
        assert float(rows[tower, "proj"]["mean"]) > 0.9
    assert rows["vision", "1"]["learnt"] == "42"
    assert rows["vision", "1"]["held_out"] == "18"
    assert (rows["text", "1"]["learnt"], rows["text", "1"]["held_out"]) == (
        "84",
        "28",
    )  # 7 templates of 6 and 2 classes
    printed = capsys.readouterr().out
    assert "images: 30 images of each dataset, 9 of them held out, 3 seeds" in printed
    assert "texts: 8 classes of each dataset, 2 of them held out, 3 seeds, 7 templates" in printed
    assert "chance is 50.0 %" in printed
    words = "".join(ElementTree.parse(output).getroot().itertext())
    assert "proj" in words or output.stat().st_size > 5000  # letters may be paths
    before = output.with_suffix(".csv").read_bytes()
    assert analyze(world, model, output) == 0
    assert output.with_suffix(".csv").read_bytes() == before


def test_datasets_that_are_alike_are_not_told_apart(world, tmp_path):
    output = tmp_path / "layers.png"
    assert analyze(world, "tiny", output, "--seeds", "[0, 1, 2, 3]", data=("cold", "cold2")) == 0
    rows = rows_of(output)
    assert [stage for _, stage in rows] == ["embed", "1", "2", "3", "head"]
    assert {tower for tower, _ in rows} == {"vision"}
    assert all(abs(float(row["mean"]) - 0.5) < 0.2 for row in rows.values())
    assert analyze(world, "tiny", output, data=("warm", "cold", "cold2")) == 0
    rows = rows_of(output)
    assert float(rows["vision", "1"]["chance"]) == pytest.approx(1 / 3)
    assert 0.55 < float(rows["vision", "1"]["mean"]) < 0.85  # warm for sure, the other two by chance


def test_an_adapter_in_the_place_of_the_model(world, tmp_path):
    plain, adapted = tmp_path / "plain.svg", tmp_path / "adapted.svg"
    words = ["--templates", "a photo of a {}.", "--data", f"warm2={world / 'warm'}", "--seeds", "[3]"]
    assert analyze(world, "open_clip", plain, *words) == 0
    assert analyze(world, "adapter", adapted, *words) == 0
    one, other = rows_of(plain), rows_of(adapted)
    assert one.keys() == other.keys()
    for tower in ("vision", "text"):
        assert one[tower, "1"] == other[tower, "1"]  # below the adapter
    assert any(one[tower, stage] != other[tower, stage] for tower in ("vision", "text") for stage in ("2", "proj"))
    assert one["text", "1"]["std"] == ""
    assert (one["text", "1"]["learnt"], one["text", "1"]["held_out"]) == ("18", "6")


def test_one_tower_a_format_and_another_part(world, tmp_path):
    output = tmp_path / "layers.pdf"
    formats = ["--format", "cold=folder", "--format", "auto"]
    assert analyze(world, "open_clip", output, "--tower", "vision", "--split", "all", *formats) == 0
    rows = rows_of(output)
    assert {tower for tower, _ in rows} == {"vision"}
    assert analyze(world, "open_clip", output, "--tower", "text", "--images", "1") == 0  # no image is looked at
    assert {tower for tower, _ in rows_of(output)} == {"text"}


ERRORS = {
    "one dataset": ("open_clip", ("warm",), [], "give --data NAME=FOLDER twice or more, got 1"),
    "a folder that is not there": ("open_clip", ("warm", "nowhere"), [], "nowhere"),
    "no text tower": ("tiny", ("warm", "cold"), ["--tower", "text"], "choose --tower vision"),
    "no text tower for both": ("tiny", ("warm", "cold"), ["--tower", "both"], "choose --tower vision"),
    "no name": ("tiny", ("warm",), ["--data", "cold"], "NAME=VALUE"),
    "a name twice": ("tiny", ("warm", "warm"), [], "--data names 'warm' twice"),
    "a seed twice": ("tiny", ("warm", "cold"), ["--seeds", "[1, 1]"], "names a seed twice"),
    "no seed": ("tiny", ("warm", "cold"), ["--seeds", "[]"], "no seed"),
    "one image": ("tiny", ("warm", "cold"), ["--images", "1"], "2 to 48 can"),
    "a figure of no kind": ("tiny", ("warm", "cold"), ["--output", "x.jpg"], ".svg, .png, .pdf"),
    "a format of nothing": ("tiny", ("warm", "cold"), ["--format", "dog=folder"], "names 'dog', which no --data does"),
    "two formats": ("tiny", ("warm", "cold"), ["--format", "csv", "--format", "folder"], "is given twice"),
    "no template": ("open_clip", ("warm", "cold"), ["--templates", "a photo"], "a template has {}"),
    "two models": ("adapter", ("warm", "cold"), ["--model", "tiny"], "takes one model"),
    "an unknown model": ("absent", ("warm", "cold"), [], "absent"),
    "no such part": ("tiny", ("warm", "cold"), ["--split", "test", "--format", "warm=csv"], "warm"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_nothing(case, world, tmp_path, capsys):
    model, data, words, said = ERRORS[case]
    capsys.readouterr()
    assert analyze(world, model, tmp_path / "o/layers.svg", *words, data=data) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "o").exists()


def test_the_keyboard_leaves_nothing(world, tmp_path, monkeypatch):
    calls = []

    def stopped(*parts):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return held_out_accuracy(*parts)

    monkeypatch.setattr(procedure, "held_out_accuracy", stopped)
    assert analyze(world, "tiny", tmp_path / "o/layers.svg") == 130
    assert not (tmp_path / "o").exists()


def test_a_model_is_needed(world, capsys):
    words = ["--data", f"a={world / 'warm'}", "--data", f"b={world / 'cold'}", "--output", "x.svg"]
    assert main(["analyze", "layers", *words]) == 1
    assert "takes one model" in capsys.readouterr().err
    assert main(["analyze", "layers", "--model", "tiny", "--output", "x.svg"]) == 1
    assert "needs --data" in capsys.readouterr().err


def test_from_a_file(world, tmp_path):
    config = tmp_path / "layers.yaml"
    data = [f"{name}={world / name}" for name in ("warm", "cold")]
    options = {"model": str(world / "tiny"), "data": data, "output": str(tmp_path / "l.svg")}
    config.write_text(json.dumps(options | {"images": 10, "seeds": [0]}))
    assert main(["analyze", "layers", "--config", str(config)]) == 0
    assert len(rows_of(tmp_path / "l.svg")) == 5
    assert torch.is_grad_enabled()
