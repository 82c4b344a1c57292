"""Searches carried out by `deltalens compare`: what is trained, what is chosen, failures, kills, changed searches."""

import csv
import json
import math

import pytest
import yaml
from study_fixtures import compare, grid_of, results_of, write_study

import deltalens as dl
from deltalens.cli.main import main
from deltalens.studies import trial
from deltalens.studies.study_table import read_table
from deltalens.training.callbacks import NonFiniteLossError

STUDY = """\
title: Colours
backbones: {model: MODEL, label: tiny}
protocol: published
methods:
  LoRA: {method: lora, r: 2}
  Mona:
    method: mona
    training: {lr: 0.002, weight_decay: 0.05, min_lr: 0.1, no_decay: [bias], batch_size: 4, hflip: 0}
    search: null
    backbone: {drop_rate: 0.1}
seeds: [0, 1]
search:
  trials: 3
  space: {base_lr: {low: 0.01, high: 1, log: true}, method.r: [1, 2], hflip: [0, 0.5]}
  fixed: {optimizer: sgd}
training: {epochs: 1, batch_size: 8, warmup_epochs: 0}
"""


@pytest.fixture(scope="module")
def searched(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    file = write_study(place, folder, STUDY)
    assert compare(place, file, folder / "out") == 0
    return file, folder / "out"


def test_what_was_chosen_is_what_is_trained(searched, place):
    file, output = searched
    found = results_of(output)
    grid = grid_of(place, file, output)
    searches = {run.folder.name: run for run in grid.searches["tiny", "photos", "LoRA"]}
    assert len(searches) == 3
    assert not grid.searches["tiny", "photos", "Mona"]
    for name, run in searches.items():
        results = found[f"tiny/photos/LoRA/{name}"]
        assert results["values"] == run.values
        assert (results["settings"]["lr"], results["settings"]["optimizer"]) == (run.values["lr"], "sgd")
        assert (results["test"], results["data"]["test"]) == ({}, 0)
        assert results["parameters"]["adapter"] == run.values["method.r"] * 288
        config = run.output.read_config()
        assert config["values"] == run.values
        assert config["training"]["hflip"] == run.values["hflip"]
        assert config["methods"][0]["r"] == run.values["method.r"]
        assert name == f"lr-{run.values['lr']:g},r-{run.values['method.r']},hflip-{run.values['hflip']:g}"
    best = max(searches.values(), key=lambda run: run.results()["val"]["accuracy"])  # the first of equals
    finals = [found[f"tiny/photos/LoRA/seed-{seed}"] for seed in (0, 1)]
    assert [final["values"] for final in finals] == [best.values] * 2
    assert finals[0]["trained_in"] == best.folder.name
    for seed, final in enumerate(finals):
        assert final["parameters"]["adapter"] == best.values["method.r"] * 288
        saved = dl.from_pretrained(output / f"runs/tiny/photos/LoRA/seed-{seed}")
        assert dl.adapter_info(saved)["metrics"]["test accuracy"] == final["test"]["accuracy"]
    own = found["tiny/photos/Mona/seed-1"]["settings"]
    assert [own[name] for name in ("lr", "weight_decay", "min_lr", "no_decay", "batch_size", "optimizer")] == [
        0.002, 0.05, 0.1, ["bias"], 4, "adamw",
    ]  # fmt: skip
    config = (output / "runs/tiny/photos/Mona/seed-1/config.yaml").read_text()
    assert "drop_rate: 0.1" in config


def test_the_table_says_what_was_done(searched, place):
    file, output = searched
    table = (output / "table.md").read_text()
    assert (
        "Protocol: published, methods may have the settings of their papers. 1 epoch, batches of 8, adamw, weight "
        "decay 0.0001, warm-up of 0 and a cosine to 0 % of the rate; seeds 0, 1. Search: 3 trials for LoRA (random: "
        "base_lr 0.01 to 1, r 1, 2, hflip 0, 0.5; fixed: optimizer sgd); none for Mona (learning rate: 0.002). Trials "
        "were trained on the training data with the first seed, and the best on the validation data after the last "
        "epoch was chosen. With settings of their own: Mona (lr 0.002, weight_decay 0.05, min_lr 0.1, no_decay [bias], "
        "batch_size 4, hflip 0, drop_rate 0.1, no search)."
    ) in table
    cell = next(cell for cell in read_table(grid_of(place, file, output)).cells if cell.variant.label == "LoRA")
    line = next(line for line in table.splitlines() if line.startswith("| LoRA"))
    assert line.split("|")[6].strip() == cell.settings_text()
    assert set(cell.chosen) == {"lr", "method.r", "hflip"}
    assert {"method.r", "hflip"} <= cell.edges  # of two values each is at an edge
    rows = {row["folder"]: row["settings"] for row in csv.DictReader((output / "runs.csv").open())}
    assert rows["runs/tiny/photos/Mona/seed-0"] == "lr 0.002"
    assert rows["runs/tiny/photos/LoRA/seed-0"] == cell.settings_text().replace(" *", "")
    page = (output / "report.html").read_text()
    assert "and 3 that choose settings" in page
    assert cell.settings_text() in page


def test_settings_changed_in_an_old_folder_are_refused(searched, place, tmp_path, capsys):
    changes = {
        "sgd": ("adamw", "training.optimizer was 'sgd' and is 'adamw'"),
        "drop_rate: 0.1": ("drop_rate: 0.2", "backbone.options was {'drop_rate': 0.1} and is {'drop_rate': 0.2}"),
        "    backbone: {drop_rate: 0.1}\n": ("", "backbone.options was {'drop_rate': 0.1} and is {}"),
        "min_lr: 0.1": ("min_lr: 0.2", "training.min_lr was 0.1 and is 0.2"),
    }
    for before, (after, message) in changes.items():
        file = write_study(place, tmp_path, STUDY.replace(before, after))
        assert compare(place, file, searched[1]) == 1
        assert message in capsys.readouterr().err


def test_an_option_that_the_backbone_lacks_is_said_before_anything_is_trained(place, tmp_path, capsys):
    file = write_study(place, tmp_path, STUDY.replace("drop_rate", "drop_rat"))
    assert compare(place, file, tmp_path / "out") == 1
    assert "drop_rat" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ with made-up results
QUICK = """\
backbones: {model: MODEL, label: tiny}
methods: {Linear: linear, Mona: mona}
seeds: [0, 1]
keep_adapters: false
search: {trials: TRIALS, sampler: grid, space: {lr: RATES, weight_decay: [0, 0.1]}}
"""


@pytest.fixture
def trained(monkeypatch):
    """Runs that are not trained: accuracy is highest at lr 0.01 and weight decay 0.1. Returns what was trained; a rate
    in `trained.bad` has a loss that is not finite."""

    class Trained(list):
        bad: set[float] = set()
        bad_folders: set[str] = set()
        stop_after = math.inf

    found = Trained()

    def train(self, run, values, again=False):
        if len(found) >= found.stop_after:
            raise KeyboardInterrupt
        found.append((run.variant.label, run.folder.name, values["lr"]))
        if values["lr"] in found.bad or run.folder.name in found.bad_folders:
            raise NonFiniteLossError("the loss became nan")
        run.output.prepare(overwrite=again, resume=not again)
        run.output.write_config(trial.run_config(self.study, run, values))
        accuracy = 0.9 - 0.1 * abs(math.log10(values["lr"]) + 2) + values.get("weight_decay", 0)
        results = {
            "val": {"accuracy": accuracy},
            "test": {} if run.stage == "search" else {"accuracy": accuracy - 0.2},
            "settings": {"lr": values["lr"]},
            "values": values,
            "seconds": {"total": 1.0, "training": 1.0},
            "parameters": {"adapter": 0, "head": 3, "backbone": 10, "percent": 0.0},
        }
        run.output.write_results(results)
        return results

    monkeypatch.setattr(trial.Workplace, "train", train)
    return found


def study_file(place, folder, rates, trials=99):
    return write_study(place, folder, QUICK.replace("RATES", rates).replace("TRIALS", str(trials)))


def chosen_by(place, file, output):
    cells = read_table(grid_of(place, file, output)).cells
    return {cell.variant.label: (dict(cell.chosen), len(cell.accuracies)) for cell in cells}


def test_a_changed_search_keeps_common_trials_and_trains_anew_where_another_wins(place, tmp_path, trained):
    output = tmp_path / "out"
    file = study_file(place, tmp_path, "[1e-4, 1e-3]")
    assert compare(place, file, output) == 0
    assert chosen_by(place, file, output)["Mona"] == ({"lr": 1e-3, "weight_decay": 0.1}, 2)
    assert len(trained) == 2 * (4 + 2)
    trained.clear()
    file = study_file(place, tmp_path, "[1e-4, 1e-3, 1e-2]")
    assert chosen_by(place, file, output)["Mona"] == ({}, 0)  # a search is to come: nothing is chosen yet
    assert grid_of(place, file, output).counts() == {"finished": 8, "failed": 0, "open": 8}
    assert compare(place, file, output) == 0
    assert [name for label, name, _ in trained if label == "Mona"] == [
        "lr-0.01,weight_decay-0", "lr-0.01,weight_decay-0.1", "seed-0", "seed-1",
    ]  # fmt: skip
    assert chosen_by(place, file, output)["Mona"] == ({"lr": 1e-2, "weight_decay": 0.1}, 2)
    trained.clear()
    file = study_file(place, tmp_path, "[1e-2]")  # the winner is the same: nothing is left to do
    assert compare(place, file, output) == 0
    assert trained == []


def test_a_search_that_was_stopped_goes_on(place, tmp_path, trained):
    file, output = study_file(place, tmp_path, "[1e-3, 1e-2]", trials=3), tmp_path / "out"
    trained.stop_after = 2
    assert compare(place, file, output) == 130
    trained.stop_after = math.inf
    assert compare(place, file, output) == 0
    assert len(trained) == len(set(trained)) == 2 * (3 + 2)


def test_a_loss_that_is_not_finite_is_a_trial_that_lost(place, tmp_path, trained, capsys):
    trained.bad = {1e-2}
    file, output = study_file(place, tmp_path, "[1e-3, 1e-2]"), tmp_path / "out"
    assert compare(place, file, output) == 0
    assert chosen_by(place, file, output)["Linear"] == ({"lr": 1e-3, "weight_decay": 0.1}, 2)
    assert "- Linear, lr 0.01, weight_decay 0: the loss became nan" in (output / "table.md").read_text()


def test_failures_are_tried_again_when_asked(place, tmp_path, trained):
    trained.bad, trained.bad_folders = {1e-4}, {"seed-1"}
    file, output = study_file(place, tmp_path, "[1e-4, 1e-2]"), tmp_path / "out"
    assert compare(place, file, output) == 0
    assert grid_of(place, file, output).counts() == {"finished": 6, "failed": 6, "open": 0}
    trained.clear()
    trained.bad, trained.bad_folders = set(), set()
    assert compare(place, file, output, "--retry-failed") == 0
    assert [name for label, name, _ in trained if label == "Mona"] == [
        "lr-0.0001,weight_decay-0", "lr-0.0001,weight_decay-0.1", "seed-1",
    ]  # fmt: skip


def test_where_all_trials_failed_another_search_helps(place, tmp_path, trained):
    trained.bad = {1.0}
    file, output = study_file(place, tmp_path, "[1]"), tmp_path / "out"
    assert compare(place, file, output) == 0
    assert grid_of(place, file, output).counts() == {"finished": 0, "failed": 8, "open": 0}
    assert "every trial of the search failed: the loss became nan" in (output / "table.md").read_text()
    trained.clear()
    assert compare(place, file, output) == 0
    assert trained == []
    file = study_file(place, tmp_path, "[1e-2, 1]")
    assert compare(place, file, output) == 0
    assert {name for _, name, _ in trained} == {
        "lr-0.01,weight_decay-0", "lr-0.01,weight_decay-0.1", "seed-0", "seed-1",
    }  # fmt: skip
    assert chosen_by(place, file, output)["Mona"] == ({"lr": 1e-2, "weight_decay": 0.1}, 2)
    assert not list((output / "runs/tiny/photos/Mona/seed-0").glob("failed*"))


def test_a_folder_of_an_earlier_version_is_finished(place, tmp_path, trained):
    """Its results and configurations know no values but the rate, and no younger settings."""
    text = QUICK[: QUICK.index("search")] + "lr: {relative: [0.1, 1]}\n"
    file, output = write_study(place, tmp_path, text), tmp_path / "out"
    assert compare(place, file, output) == 0
    for path in [*output.rglob("results.json"), *output.rglob("config.yaml")]:
        content = yaml.safe_load(path.read_text())
        del content["values"]
        younger = ("min_lr", "no_decay", "schedule", "warmup_lr", "eps", "decay", "decay_at")
        for name in younger if "training" in content else ():
            del content["training"][name]
        path.write_text(json.dumps(content))
    trained.clear()
    assert compare(place, file, output) == 0
    assert trained == []
    younger = write_study(place, tmp_path, text + "training: {min_lr: 0.1}\n")
    assert compare(place, younger, output) == 1  # what the earlier version did not know had its default


# ------------------------------------------------------------------ the same settings on the command line
def test_rates_of_papers_as_options_of_train(place, tmp_path, capsys):
    words = ["train", "--model", str(place / "model"), "--method", "linear", "--data", str(place / "photos")]
    words += ["--epochs", "1", "--batch-size", "8", "--output"]
    own = ["--base-lr", "0.8", "--min-lr", "0.01", "--no-decay", "[bias, norm]"]
    assert main([*words, str(tmp_path / "a"), *own]) == 0
    settings = json.loads((tmp_path / "a/results.json").read_text())["settings"]
    assert (settings["lr"], settings["min_lr"], settings["no_decay"]) == (0.8 * 8 / 256, 0.01, ["bias", "norm"])
    config = str(tmp_path / "a/config.yaml")
    assert main(["train", "--config", config, "--output", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b/results.json").read_text())["settings"] == settings
    assert main(["train", "--config", config, "--base-lr", "0.4", "--output", str(tmp_path / "c")]) == 1
    assert "say --lr or --base-lr, not both: got 0.025 and 0.4" in capsys.readouterr().err
    tune = ["tune", *words[1:], str(tmp_path / "d"), "--base-lr", "0.8", "--trials", "2", "--space"]
    (tmp_path / "grid.yaml").write_text("sampler: grid\nspace: {lr: {relative: [0.1, 1]}}\n")
    assert main([*tune, str(tmp_path / "grid.yaml")]) == 0
    rates = {float(row["lr"]) for row in csv.DictReader((tmp_path / "d/trials.csv").open(newline=""))}
    assert sorted(rates) == pytest.approx([0.0025, 0.025])
