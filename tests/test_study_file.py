"""What a study file may say, and what its plots and its images in memory are."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from picture_folders import write_pictures
from study_fixtures import STUDY, compare, write_study

from deltalens.cli.main import main
from deltalens.cli.recipes import recipe_files, summary
from deltalens.data import eval_transform, inputs, read_image_folder
from deltalens.data.memory import ImagesInMemory, keep_in_memory
from deltalens.data.transforms import eval_resize, train_resize
from deltalens.studies import trial
from deltalens.studies.grid import Grid
from deltalens.studies.study import Training
from deltalens.studies.study_reader import read_study

# ------------------------------------------------------------------ the file
WRONG = {
    "methods:\n  A: linear\n": r"study.yaml, line 1: backbones is missing",
    "backbones: b\nmethod:\n  A: linear\n": r"line 2, method: there is no such field; did you mean methods",
    "backbones: b\nmethods:\n  A: liner\n": r"line 3, methods\.A\.method: unknown method 'liner'; did you mean linear",
    "backbones: b\nmethods:\n  A: linear\n  B: {method: mona, botleneck: 3}\n": (
        r"line 4, methods\.B\.botleneck: mona has no setting 'botleneck'; did you mean bottleneck"
    ),
    "backbones: b\nmethods:\n  A: {method: vpt, dept: 1}\n": r"methods\.A\.dept: vpt has no setting 'dept'",
    "backbones: b\nmethods:\n  A:\n  - linear\n  - {method: lora, r: 0}\n": r"line 5, methods\.A\.1\.r: r must be",
    "backbones: b\nmethods:\n  A: linear\n  A: full\n": r"line 4, methods\.A: 'A' stands here a second time",
    "backbones: b\nmethods:\n  A b: linear\n  A-b: full\n": r"line 4, methods\.A-b: .* would share the folder 'A-b'",
    "backbones: b\nmethods:\n  A: {method: linear, curve: c}\n": r"line 3, methods\.A\.curve: .* needs x",
    "backbones: b\nmethods: {A: linear}\nseeds: 3\n": r"line 3, seeds: expected a list .*got 3",
    "backbones: b\nmethods: {A: linear}\nseeds: [0, 1.5]\n": r"line 3, seeds\.1: expected a whole number .*got 1\.5",
    "backbones: b\nmethods: {A: linear}\nlr: {relatve: [1]}\n": r"line 3, lr\.relatve: .*did you mean relative",
    "backbones: b\nmethods: {A: linear}\nlr: {relative: [1, 0]}\n": r"line 3, lr\.relative\.1: .*above 0, got 0",
    "backbones: b\nmethods: {A: linear}\nlr: fast\n": r"line 3, lr: expected a number above 0, got 'fast'",
    "backbones: b\nmethods: {A: linear}\ntraining:\n  epoch: 3\n": r"line 4, training\.epoch: .*did you mean epochs",
    "backbones: b\nmethods: {A: linear}\ntraining:\n  epochs: 0\n": r"line 4, training\.epochs: .*be positive",
    "backbones: b\nmethods: {A: linear}\ntraining:\n  hflip: 2\n": r"line 4, training\.hflip: expected a share",
    "backbones: b\nmethods: {A: linear}\ntraining:\n  optimizer: lion\n": r"line 4, .*optimizer must be adamw or sgd",
    "backbones: [b, b]\nmethods: {A: linear}\n": r"line 1, backbones\.1: two backbones are called 'b'",
    "backbones: b\nmethods: {A: linear}\ndatasets: {d: {hflip: 0}}\n": r"line 3, datasets\.d: has no path",
    "backbones: b\nmethods: {A: linear}\n": r"names no datasets: give each as --data NAME=FOLDER",
    "backbones: [b\nmethods: {A: linear}\n": r"line 2: this is no valid YAML",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.replace("\n", " ")[13:60])
def test_mistakes_in_the_file_are_named(text, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=WRONG[text]):
        read_study(tmp_path / "study.yaml")


def test_what_a_file_can_say(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "backbones: [deltalens/vit-mini, {model: deltalens/vit-mini, img_size: 64}]\n"
        "datasets: {a: here, b: {path: there, hflip: 0}, c: }\n"
        "methods: {Mona: {method: mona, lr: 2e-3, x: 1, curve: m}, Linear: linear}\n"
        "lr: 1e-2\ntraining: {weight_decay: 1e-4, epochs: 7}\n"
    )
    study = read_study(tmp_path / "study.yaml", {"c": "elsewhere", "a": "other"})
    assert [b.label for b in study.backbones] == ["vit-mini", "vit-mini@64"]
    assert [(d.name, d.path, d.hflip) for d in study.datasets] == [
        ("a", "other", None),
        ("b", "there", 0),
        ("c", "elsewhere", None),
    ]
    assert [[c.values for c in study.candidates(variant)] for variant in study.variants] == [
        [{"lr": 0.002}],
        [{"lr": 0.01}],
    ]
    assert study.training_of(study.variants[0], study.datasets[1]).hflip == 0
    assert study.training.settings(0.5, 3).weight_decay == 1e-4
    assert (study.training.epochs, study.title, study.seeds) == (7, "study", (0, 1, 2))


def test_words_of_the_command(place, tmp_path, capsys):
    file = write_study(place, tmp_path)
    words = ["compare", str(file), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*words, "--data", "a=x", "--data", "b=y"]) == 0
    assert "16 runs" in capsys.readouterr().out
    assert main([*words, "--data", "photos"]) == 1
    assert "--data takes NAME=FOLDER" in capsys.readouterr().err
    assert main([*words, "--data", "a=x", "--data", "a=y"]) == 1
    assert "names 'a' twice" in capsys.readouterr().err
    assert main(["compare", "method", *words[2:], "--data", "a=x"]) == 1
    assert "methods" in capsys.readouterr().err
    assert main([*words[:-1], "--data", f"a={tmp_path / 'nowhere'}"]) == 1
    assert "no data folder at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_study_on_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[1] / "docs/studies.md").read_text()
    text = page.partition("<!-- study -->\n```yaml\n")[2].partition("```")[0]
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(tmp_path / "study.yaml")
    assert len(list(Grid(study, tmp_path).runs())) == 3 * 2 * 5 * (3 + 3)
    for entry in (*vars(Training()), *vars(study)):  # every field of the file is explained
        assert f"`{entry}`" in page or entry in ("variants", "left_out"), entry


STUDIES = recipe_files("compare")


@pytest.mark.parametrize("name", [name for name in STUDIES if "/" not in name])  # the others: test_recipes.py
def test_studies_in_the_package_are_valid(name):
    study = read_study(STUDIES[name], {"d": "."})
    assert {(dataset.source, dataset.path) for dataset in study.datasets} == {("d", ".")}
    assert summary(STUDIES[name]).endswith(f"deltalens compare {name} --data NAME=FOLDER --output DIR")


def test_studies_and_training_recipes_are_kept_apart(capsys):
    varied = {"data-fraction", "model-size", "mona-ablations", "prompt-depth", "prompt-length", "vpt-locations"}
    assert {name for name in STUDIES if "/" not in name} == {"methods", *varied}
    assert set(recipe_files("train")) == set(recipe_files()) - set(STUDIES) - set(recipe_files("tune"))
    assert main(["train", "--recipe", "methods", "--data", "d", "--output", "o"]) == 2


# ------------------------------------------------------------------ plots, and images in memory
def test_plots_are_pictures_of_the_numbers(place, tmp_path, monkeypatch):
    text = STUDY.replace("x: 2,", "x: 20,").replace("seeds", "  L1: {method: lora, r: 1, x: 1, curve: LoRA}\nseeds")
    file = write_study(place, tmp_path, text)

    def train(self, run, values, again=False):
        accuracy = {"Linear": 0.5, "LoRA + biases": 0.8, "L1": 0.6}[run.variant.label] + 0.1 * run.seed
        results = {
            "val": {"accuracy": accuracy},
            "test": {} if run.stage == "search" else {"accuracy": accuracy},
            "settings": {"lr": values["lr"]},
            "seconds": {"total": 1.0, "training": 1.0},
            "parameters": {"adapter": 10, "head": 3, "backbone": 100, "percent": 10.0},
        }
        run.output.write_results(results)
        return results

    monkeypatch.setattr(trial.Workplace, "train", train)
    assert compare(place, file, tmp_path / "out") == 0
    plots = {path.stem: ElementTree.parse(path).getroot() for path in (tmp_path / "out/plots").iterdir()}
    assert set(plots) == {"tiny-photos-parameters", "tiny-photos-curves"}
    dots = {
        name: [circle[0].text for circle in root.iter("{http://www.w3.org/2000/svg}circle")]
        for name, root in plots.items()
    }
    assert dots["tiny-photos-curves"] == ["LoRA, 1: 65.0 %", "LoRA, 20: 85.0 %"]
    assert len(dots["tiny-photos-parameters"]) == 3
    assert "Linear: 13, 55.0 %" in dots["tiny-photos-parameters"]


def test_images_in_memory_are_those_of_the_files(tmp_path):
    data = read_image_folder(write_pictures(tmp_path / "photos", 8, size=50))
    preprocessing = {
        "input_size": [3, 32, 24], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
    }  # fmt: skip
    for crop_mode in ("center", "squash"):
        settings = preprocessing | {"crop_mode": crop_mode}
        data.val.transform = eval_transform(settings)
        kept = keep_in_memory(data.val, eval_resize(settings))
        assert isinstance(kept, ImagesInMemory)
        assert all(torch.equal(kept[i][0], data.val[i][0]) and kept[i][1] == data.val[i][1] for i in range(len(kept)))
    shrunk = keep_in_memory(data.train, train_resize(preprocessing, min_crop=0.64))
    assert {tuple(image.shape) for image in shrunk.images} == {(3, 40, 43)}  # 32 / 0.8 by 24 / 0.8, proportions kept
    whole = keep_in_memory(data.train, train_resize(preprocessing | {"input_size": [3, 300, 300]}, 1.0))
    assert {tuple(image.shape) for image in whole.images} == {(3, 50, 54)}
    assert keep_in_memory(data.train, train_resize(preprocessing, 0.64), limit=1000) is data.train


def test_unsplit_folders_are_split_alike_for_all_runs(place, tmp_path, monkeypatch):
    """By a seed of the study's own, not by the run's."""
    write_pictures(tmp_path / "photos", 10)
    seen = []
    monkeypatch.setattr(
        inputs, "keep_in_memory", lambda files, resize: seen.append((len(files), tuple(files.paths))) or files
    )
    file = write_study(place, tmp_path, STUDY.replace("lr: {relative: [1, 0.1]}", "split: {test_fraction: 0.2}"))
    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--data", f"p={tmp_path / 'photos'}"]) == 0
    configs = [json.loads(path.read_text())["info"]["split"] for path in tmp_path.rglob("adapter_config.json")]
    assert len(configs) == 4
    assert all(split == configs[0] for split in configs)
    assert [count for count, _ in seen] == [18, 6, 6]  # train, val and test, read once for all four runs
