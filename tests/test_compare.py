"""`deltalens compare`: what is run, what is chosen on which images, what survives a kill, and what the table says."""

import csv
import json
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from picture_folders import write_pictures, write_splits, write_tiny_backbone

import deltalens as dl
from deltalens.cli.main import main
from deltalens.cli.recipes import recipe_files, summary
from deltalens.data import eval_transform, read_image_folder
from deltalens.data.memory import ImagesInMemory, keep_in_memory
from deltalens.data.transforms import eval_resize, train_resize
from deltalens.studies import trial
from deltalens.studies.grid import Grid
from deltalens.studies.study import read_study
from deltalens.studies.study_table import read_table
from deltalens.training import callbacks, fit

STUDY = """\
title: Colours
backbones: {model: MODEL, label: tiny}
methods:
  Linear: linear
  LoRA + biases: {methods: [{method: lora, r: 2}, bitfit], x: 2, curve: LoRA}
seeds: [0, 1]
lr: {relative: [1, 0.1]}
training: {epochs: 2, batch_size: 8, warmup_epochs: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and a backbone."""
    folder = tmp_path_factory.mktemp("study")
    write_splits(folder / "photos", train=8, val=4, test=6)
    write_tiny_backbone(folder / "model")
    return folder


def write_study(place: Path, folder: Path, text: str = STUDY) -> Path:
    file = folder / "study.yaml"
    file.write_text(text.replace("MODEL", str(place / "model")))
    return file


def compare(place: Path, file: Path, output: Path, *words: str) -> int:
    return main(["compare", str(file), "--output", str(output), "--data", f"photos={place / 'photos'}", *words])


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """(study file, output) of a study that has been run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_study(place, folder)
    assert compare(place, file, folder / "out") == 0
    return file, folder / "out"


def results_of(output: Path) -> dict[str, dict]:
    return {
        file.parent.relative_to(output / "runs").as_posix(): json.loads(file.read_text())
        for file in output.rglob("results.json")
    }


def grid_of(place, file, output) -> Grid:
    return Grid(read_study(file, {"photos": str(place / "photos")}), output)


# ------------------------------------------------------------------ a whole study
def test_every_run_is_there(finished):
    cells = ("tiny/photos/Linear", "tiny/photos/LoRA-+-biases")
    rates = {cells[0]: ("0.003", "0.03"), cells[1]: ("0.0005", "0.005")}
    expected = {f"{cell}/lr-{rate}" for cell in cells for rate in rates[cell]}
    expected |= {f"{cell}/seed-{seed}" for cell in cells for seed in (0, 1)}
    assert set(results_of(finished[1])) == expected


def test_searches_see_no_test_image_and_final_runs_see_them_once(finished):
    for name, results in results_of(finished[1]).items():
        assert bool(results["test"]) == ("/seed-" in name), name
        assert results["data"]["test"] == (18 if "/seed-" in name else 0)
        assert (results["data"]["train"], results["data"]["val"]) == (24, 12)


def test_the_rate_is_the_best_on_validation(finished):
    results = results_of(finished[1])
    for cell in {name.rpartition("/")[0] for name in results}:
        searches = [r for name, r in results.items() if name.startswith(f"{cell}/lr-")]
        best = max(searches, key=lambda r: (r["val"]["accuracy"], -r["settings"]["lr"]))["settings"]["lr"]
        finals = [r for name, r in results.items() if name.startswith(f"{cell}/seed-")]
        assert [final["settings"]["lr"] for final in finals] == [best] * 2


def test_the_first_final_run_equals_one_trained_anew(finished, place):
    """Its training is taken over from the search; only the test was left."""
    for cell, methods in (("Linear", [dl.LinearConfig()]), ("LoRA-+-biases", [dl.LoRAConfig(r=2), dl.BitFitConfig()])):
        results = results_of(finished[1])[f"tiny/photos/{cell}/seed-0"]
        assert results["trained_in"] == f"lr-{results['settings']['lr']:g}"
        file, output = finished
        grid = grid_of(place, file, output)
        run = next(run for run in grid.runs() if run.folder == output / "runs/tiny/photos" / cell / "seed-0")
        from deltalens.cli.sized_backbone import create_sized_backbone

        workplace = trial.Workplace(grid.study, create_sized_backbone)
        model, preprocessing = workplace._model(run, 3)
        dl.attach(model, methods)
        task, data = workplace._task(run, model, preprocessing)
        anew = fit(task, data, workplace._settings(run, results["settings"]["lr"]))
        assert anew["test"] == results["test"]
        assert anew["val"] == results["val"]
        saved = dl.from_pretrained(run.folder)
        assert dl.adapter_info(saved)["metrics"]["test accuracy"] == results["test"]["accuracy"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved.state_dict()[name]), name


def test_the_table_holds_the_numbers_of_the_runs(finished, place):
    file, output = finished
    results = results_of(output)
    rows = {row["folder"].removeprefix("runs/"): row for row in csv.DictReader((output / "runs.csv").open())}
    assert rows.keys() == results.keys()
    for name, row in rows.items():
        assert float(row["val_accuracy"]) == results[name]["val"]["accuracy"]
        assert row["test_accuracy"] == (str(results[name]["test"]["accuracy"]) if "/seed-" in name else "")
        assert int(row["adapter_parameters"]) == results[name]["parameters"]["adapter"]
        assert float(row["lr"]) == results[name]["settings"]["lr"]
    cells = {cell.variant.label: cell for cell in read_table(grid_of(place, file, output)).cells}
    markdown = (output / "table.md").read_text()
    for label, folder in (("Linear", "Linear"), ("LoRA + biases", "LoRA-+-biases")):
        found = [results[f"tiny/photos/{folder}/seed-{seed}"] for seed in (0, 1)]
        accuracies = [each["test"]["accuracy"] for each in found]
        mean, std = statistics.fmean(accuracies), abs(accuracies[0] - accuracies[1]) / 2**0.5
        assert cells[label].mean == pytest.approx(mean)
        assert cells[label].std == pytest.approx(std)
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
        columns = [column.strip() for column in line.strip("|").split("|")]
        adapter, head = (found[0]["parameters"][key] for key in ("adapter", "head"))
        assert columns[1] == f"{100 * mean:.1f} ± {100 * std:.1f}"
        assert columns[2:4] == [f"{adapter:,}", f"{adapter + head:,}"]
        assert columns[5] == f"{found[0]['settings']['lr']:g} *"  # of two candidates each is at an edge
    assert cells["LoRA + biases"].adapter_parameters == 3 * 2 * 2 * (24 + 24) + bias_count(place)


def bias_count(place) -> int:
    model = dl.create_backbone(str(place / "model"))
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") and "head" not in name)


def test_nothing_is_done_twice(finished, place, monkeypatch, capsys):
    file, output = finished
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    monkeypatch.setattr(trial, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(trial, "_tested", lambda *_: pytest.fail("tested again"))
    assert compare(place, file, output) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == before
    capsys.readouterr()
    assert compare(place, file, output, "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "8 runs: 8 finished, 0 failed, 0 open"
    assert len(printed) == 9


def test_adapters_are_kept_or_dropped(finished, place, tmp_path):
    kept = {path.parent.name for path in finished[1].rglob("adapter_model.safetensors")}
    assert kept == {"seed-0", "seed-1"}
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0, 1]\nkeep_adapters: false")
    file = write_study(place, tmp_path, text)
    assert compare(place, file, tmp_path / "out") == 0
    assert list(tmp_path.rglob("adapter_*")) == []
    assert scores(tmp_path / "out") == scores(finished[1])


def scores(output: Path) -> dict[str, tuple]:
    return {name: (r["val"], r["test"], r["settings"]["lr"]) for name, r in results_of(output).items()}


def test_a_method_added_later_and_the_table_alone(finished, place, tmp_path):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(finished[1], output)
    file = write_study(place, tmp_path, STUDY.replace("seeds", "  BitFit: bitfit\nseeds"))
    assert compare(place, file, output, "--only-table") == 0
    line = next(line for line in (output / "table.md").read_text().splitlines() if line.startswith("| BitFit"))
    assert line.split("|")[2].strip() == "-"
    assert compare(place, file, output) == 0
    assert len(results_of(output)) == 12
    assert {name: s for name, s in scores(output).items() if "BitFit" not in name} == scores(finished[1])


# ------------------------------------------------------------------ kills, failures, changes
@pytest.mark.parametrize("epochs_before_the_kill", [1, 4, 11])
def test_a_stopped_study_goes_on_as_if_it_had_not_been(epochs_before_the_kill, finished, place, tmp_path, monkeypatch):
    file, saves, save = write_study(place, tmp_path), [], callbacks.KeepLast._save

    def save_or_stop(self, trainer):
        save(self, trainer)
        saves.append(1)
        if len(saves) == epochs_before_the_kill:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks.KeepLast, "_save", save_or_stop)
    assert compare(place, file, tmp_path / "out") == 130
    assert scores(tmp_path / "out").keys() < scores(finished[1]).keys()
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1
    assert compare(place, file, tmp_path / "out") == 0
    assert len(saves) == 12  # six runs are trained, two epochs each, none of them twice
    assert scores(tmp_path / "out") == scores(finished[1])


def test_a_failed_run_is_shown_and_tried_again_only_when_asked(place, tmp_path, capsys, monkeypatch):
    text = STUDY.replace(
        "  Linear: linear", "  Linear: {method: linear, lr: 1.0e+30}\n  Mona: {method: mona, lr: 1e30}"
    )
    text = text.replace("[1, 0.1]", "[1, 1e-32]")
    file, output = write_study(place, tmp_path, text), tmp_path / "out"
    assert compare(place, file, output) == 0
    printed = capsys.readouterr().out
    state = {run.folder.name: grid_of(place, file, output).state(run) for run in grid_of(place, file, output).runs()
             if run.variant.label == "Mona"}  # fmt: skip
    assert state == {"lr-1e+30": "failed", "lr-0.01": "finished", "seed-0": "finished", "seed-1": "finished"}
    assert "search lr 1e+30: failed: " in printed
    table = (output / "table.md").read_text()
    assert "- Mona, lr 1e+30: the" in table
    trained = []
    monkeypatch.setattr(trial, "fit", lambda *args, **kwargs: trained.append(args[3]) or fit(*args, **kwargs))
    assert compare(place, file, output) == 0
    assert trained == []
    assert compare(place, file, output, "--retry-failed") == 0
    assert {folder.name for folder in trained} == {"lr-1e+30"}


def test_a_method_that_does_not_fit_fails_alone(place, tmp_path, capsys):
    """Every candidate fails, so there is no rate for the final runs, which say so."""
    text = STUDY.replace("  Linear: linear", "  Wrong: {method: lora, target_modules: nothing}\n  Linear: linear")
    file, output = write_study(place, tmp_path, text), tmp_path / "out"
    assert compare(place, file, output) == 0
    table = (output / "table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| Wrong"))
    assert line.split("|")[2].strip() == "failed"
    assert "seed 1: every learning rate failed: target_modules='nothing' matches no layer" in table
    assert len(results_of(output)) == 8
    rows = [row for row in csv.DictReader((output / "runs.csv").open()) if row["method"] == "Wrong"]
    assert [row["status"] for row in rows] == ["failed"] * 4


def test_another_training_in_the_same_folder_is_refused(finished, place, tmp_path, capsys):
    file = write_study(place, tmp_path, STUDY.replace("epochs: 2", "epochs: 3"))
    assert compare(place, file, finished[1]) == 1
    assert "training.epochs was 2 and is 3" in capsys.readouterr().err
    file = write_study(place, tmp_path, STUDY.replace("r: 2", "r: 1"))
    assert compare(place, file, finished[1]) == 1
    assert "methods.0.r was 2 and is 1" in capsys.readouterr().err


def test_the_choice_does_not_see_the_test(place, tmp_path, monkeypatch):
    """With made-up results in which test and validation disagree, validation wins."""

    def train(self, run, rate, again=False):
        val = {0.03: 0.9, 0.003: 0.5}.get(rate, 0.5)
        results = {
            "val": {"accuracy": val},
            "test": {} if run.stage == "search" else {"accuracy": 1 - val},
            "settings": {"lr": rate},
            "seconds": {"total": 1.0, "training": 1.0},
            "parameters": {"adapter": 0, "head": 3, "backbone": 10, "percent": 0.0},
        }
        run.output.write_results(results)
        return results

    monkeypatch.setattr(trial.Workplace, "train", train)
    file = write_study(place, tmp_path)
    assert compare(place, file, tmp_path / "out") == 0
    grid = grid_of(place, file, tmp_path / "out")
    cells = {cell.variant.label: cell for cell in read_table(grid).cells}
    assert (cells["Linear"].lr, cells["Linear"].accuracies) == (0.03, (pytest.approx(0.1),) * 2)
    assert cells["LoRA + biases"].lr == 0.0005  # of equals the smallest


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
    assert [study.candidates(variant) for variant in study.variants] == [[0.002], [0.01]]
    assert trial.augmentation(study.training, study.datasets[1]).hflip == 0
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
    for entry in (*vars(trial.Training()), *vars(study)):  # every field of the file is explained
        assert f"`{entry}`" in page or entry in ("variants", "rates", "fixed_rate"), entry


STUDIES = recipe_files("compare")


@pytest.mark.parametrize("name", STUDIES)
def test_studies_in_the_package_are_valid(name):
    study = read_study(STUDIES[name], {"d": "."})
    assert [dataset.path for dataset in study.datasets] == ["."]
    assert summary(STUDIES[name]).endswith(f"deltalens compare {name} --data NAME=FOLDER --output DIR")


def test_studies_and_training_recipes_are_kept_apart(capsys):
    assert set(STUDIES) == {"methods", "mona-ablations", "prompt-depth", "prompt-length", "vpt-locations"}
    assert set(recipe_files("train")) == set(recipe_files()) - set(STUDIES)
    assert main(["train", "--recipe", "methods", "--data", "d", "--output", "o"]) == 2


# ------------------------------------------------------------------ plots, and images in memory
def test_plots_are_pictures_of_the_numbers(place, tmp_path, monkeypatch):
    text = STUDY.replace("x: 2,", "x: 20,").replace("seeds", "  L1: {method: lora, r: 1, x: 1, curve: LoRA}\nseeds")
    file = write_study(place, tmp_path, text)

    def train(self, run, rate, again=False):
        accuracy = {"Linear": 0.5, "LoRA + biases": 0.8, "L1": 0.6}[run.variant.label] + 0.1 * run.seed
        results = {
            "val": {"accuracy": accuracy},
            "test": {} if run.stage == "search" else {"accuracy": accuracy},
            "settings": {"lr": rate},
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
        trial, "keep_in_memory", lambda files, resize: seen.append((len(files), tuple(files.paths))) or files
    )
    file = write_study(place, tmp_path, STUDY.replace("lr: {relative: [1, 0.1]}", "split: {test_fraction: 0.2}"))
    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--data", f"p={tmp_path / 'photos'}"]) == 0
    configs = [json.loads(path.read_text())["info"]["split"] for path in tmp_path.rglob("adapter_config.json")]
    assert len(configs) == 4
    assert all(split == configs[0] for split in configs)
    assert [count for count, _ in seen] == [18, 6, 6]  # train, val and test, read once for all four runs
