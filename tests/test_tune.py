"""Searches: what is drawn, what decides, what survives a kill, and what is refused."""

import csv
import json
import math
from dataclasses import replace

import optuna
import pytest
import torch
import yaml
from toy_training import NAMES, QUIET, Interrupted, adapted_task, coloured, interrupt_at

import deltalens as dl
from deltalens.cli.main import main
from deltalens.cli.recipes import recipe_files
from deltalens.data import Splits
from deltalens.studies import tune
from deltalens.studies.search_space import DEFAULT, Choice, Range, SearchSpace, read_space
from deltalens.studies.tune import Search, trials_table, write_tables
from deltalens.training import TrainingSettings

SPACE = SearchSpace("tpe", {"lr": Range(1e-4, 1e-1, log=True), "weight_decay": Choice((0.0, 0.1))})
EPOCHS = 2


@pytest.fixture
def quick(monkeypatch):
    """Runs that are not trained: a peak of accuracy at lr 1e-2, approached epoch by epoch."""

    def fit(task, data, settings, folder, resume, config, after_epoch):
        for epoch in (1, 2, 3):
            value = 1 - abs(math.log10(settings.lr) + 2) / 4 - 0.1 * settings.weight_decay - 0.1 / epoch
            after_epoch({"epoch": epoch, "val_accuracy": value})
        return {"val": {"accuracy": value}}

    monkeypatch.setattr(tune, "fit", fit)


def builder(stop_at: tuple[int, int] | None = None, bad_rate: float | None = None):
    """A `build` of small runs. stop_at: (call, forward) at which the run is interrupted, as by a kill."""
    calls = []

    def build(values):
        calls.append(values)
        if bad_rate is not None and values["lr"] > bad_rate:
            raise ValueError("this rate is too high")
        task = adapted_task(dl.MonaConfig(bottleneck=2))
        if stop_at is not None and len(calls) == stop_at[0]:
            interrupt_at(task, stop_at[1])
        settings = TrainingSettings(**{**QUIET, **values, "epochs": EPOCHS, "warmup_epochs": 0})
        return task, Splits(coloured(40, 0), coloured(12, 1), NAMES), settings, dict(values)

    build.calls = calls
    return build


def search(folder, **options) -> Search:
    return Search(
        folder, options.pop("space", SPACE), **{"trials": 6, "prune": "none", "metric": "accuracy", **options}
    )


def test_every_trial_is_a_run_and_the_last_epoch_decides(tmp_path):
    found = search(tmp_path, trials=3)
    records = found.run(builder())
    assert [record.state for record in records] == ["done"] * 3
    assert len({record.values["lr"] for record in records}) == 3
    assert all(1e-4 <= record.values["lr"] <= 1e-1 for record in records)
    for record in records:
        with open(found.folder_of(record) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert record.epochs == len(rows) == EPOCHS
        assert record.value == pytest.approx(float(rows[-1]["val_accuracy"]))
    best = found.best()
    assert best.value == max(record.value for record in records)
    kept = [record.number for record in records if (found.folder_of(record) / "adapter_model.safetensors").is_file()]
    assert kept == [best.number]


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    expected = search(tmp_path / "whole", trials=3).run(builder())
    with pytest.raises(Interrupted):
        search(tmp_path / "killed", trials=3).run(builder(stop_at=(2, 7)))
    torch.rand(5)
    rest = builder()
    found = search(tmp_path / "killed", trials=3).run(rest)
    assert [(r.values, r.value, r.state) for r in found] == [(r.values, r.value, r.state) for r in expected]
    assert len(rest.calls) == 2  # the stopped one and the one after it


@pytest.mark.usefixtures("quick")
def test_stopped_again_and_again_when_earlier_trials_guide_later_ones(tmp_path):
    """Beyond its first ten trials TPE draws from what it has seen."""
    expected = search(tmp_path / "whole", trials=14).run(builder())
    for stop in range(1, 5):
        search(tmp_path / "killed", trials=3 * stop + 1).run(builder())
    found = search(tmp_path / "killed", trials=14).run(builder())
    assert [(r.values, r.value) for r in found] == [(r.values, r.value) for r in expected]
    late = [abs(math.log10(r.values["lr"]) + 2) for r in found[10:]]
    assert min(late) < 0.5  # and it has learnt where the peak is


@pytest.mark.usefixtures("quick")
def test_killed_between_two_draws(tmp_path, monkeypatch):
    """A trial whose first value is in the database draws the second as it would have."""
    space = SearchSpace("random", {"lr": Range(1e-4, 1e-1, log=True), "weight_decay": Range(0.0, 0.1)})
    expected = search(tmp_path / "whole", space=space, trials=3).run(builder())
    suggested, suggest = [], optuna.Trial.suggest_float

    def suggest_or_die(trial, name, *words, **options):
        suggested.append(name)
        if len(suggested) == 4:
            raise Interrupted
        return suggest(trial, name, *words, **options)

    monkeypatch.setattr(optuna.Trial, "suggest_float", suggest_or_die)
    with pytest.raises(Interrupted):
        search(tmp_path / "killed", space=space, trials=3).run(builder())
    found = search(tmp_path / "killed", space=space, trials=3).run(builder())
    assert [r.values for r in found] == [r.values for r in expected]


@pytest.mark.usefixtures("quick")
def test_killed_between_verdict_and_record(tmp_path):
    """A trial that successive halving has ended, and marked as past that rung, is ended after the kill too."""
    expected = search(tmp_path / "whole", prune="halving", trials=7).run(builder())
    assert "pruned" in {record.state for record in expected}

    def die(*words, **options):
        raise Interrupted

    for number in range(1, 8):
        killed = search(tmp_path / "killed", prune="halving", trials=number)
        killed.study.tell = die
        with pytest.raises(Interrupted):
            killed.run(builder())
        found = search(tmp_path / "killed", prune="halving", trials=number).run(builder())
    assert found == expected


@pytest.mark.usefixtures("quick")
def test_pruned_trials_end_early_and_count(tmp_path):
    found = search(tmp_path, prune="halving", trials=8, metric="accuracy")
    records = found.run(builder())
    assert len(records) == 8
    assert {record.state for record in records} == {"done", "pruned"}
    assert all(record.epochs < 3 for record in records if record.state == "pruned")
    assert found.best().state == "done"


@pytest.mark.usefixtures("quick")
def test_a_failed_trial_is_shown_and_does_not_end_the_search(tmp_path):
    found = search(tmp_path, trials=6)
    records = found.run(builder(bad_rate=1e-2))
    states = {record.state for record in records}
    assert states == {"done", "failed"}
    assert "this rate is too high" in trials_table(found)
    assert found.best().values["lr"] <= 1e-2
    none = search(tmp_path / "none", trials=2)
    none.run(builder(bad_rate=0.0))
    with pytest.raises(ValueError, match="no trial finished: this rate is too high"):
        none.best()


@pytest.mark.usefixtures("quick")
def test_a_grid_is_every_point_once(tmp_path):
    space = SearchSpace("grid", {"lr": Choice((1e-2, 1e-1)), "weight_decay": Choice((0.0, 0.1))})
    records = search(tmp_path, space=space, trials=40).run(builder())
    points = {(record.values["lr"], record.values["weight_decay"]) for record in records}
    assert len(records) == len(points) == 4


@pytest.mark.usefixtures("quick")
def test_more_trials_go_on_from_the_earlier_ones(tmp_path):
    first = search(tmp_path, trials=2).run(builder())
    again = builder()
    more = search(tmp_path, trials=3).run(again)
    assert more[:2] == first
    assert len(again.calls) == 1


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    search(tmp_path)
    with pytest.raises(ValueError, match="holds a search with another space"):
        search(tmp_path, space=replace(SPACE, sampler="random"))
    with pytest.raises(ValueError, match="another metric"):
        search(tmp_path, metric="mean_class_accuracy")


@pytest.mark.usefixtures("quick")
def test_tables_name_every_trial(tmp_path):
    found = search(tmp_path, trials=2)
    found.run(builder())
    write_tables(found)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert [row["trial"] for row in rows] == ["1", "2"]
    assert {float(row["lr"]) for row in rows} == {record.values["lr"] for record in found.records()}
    assert (tmp_path / "trials.md").read_text().count("\n") == 4


# ------------------------------------------------------------------ search spaces
class Middle:
    """A trial that draws the lower end of everything, and remembers what it was asked."""

    def __init__(self):
        self.asked = {}

    def suggest_float(self, name, low, high, log=False):
        self.asked[name] = (low, high, log)
        return low

    suggest_int = suggest_float

    def suggest_categorical(self, name, values):
        self.asked[name] = values
        return values[0]


def test_what_a_file_says(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "sampler: random\nspace:\n  lr: {relative: [0.1, 10]}\n  weight_decay: [0, 1e-4]\n"
        "  method.num_tokens: {low: 1, high: 200, log: true}\nfixed: {optimizer: sgd}\n"
    )
    trial = Middle()
    values = read_space(file).draw(trial, default_lr=3e-3, batch_size=64)
    assert values == {"optimizer": "sgd", "lr": pytest.approx(3e-4), "weight_decay": 0, "method.num_tokens": 1}
    assert trial.asked["lr"] == (0.1, 10.0, True)
    assert trial.asked["method.num_tokens"] == (1, 200, True)


def test_base_rates_scale_with_the_batch():
    space = SearchSpace("grid", {"base_lr": Choice((2.5,))})
    assert space.draw(Middle(), 1.0, batch_size=64) == {"lr": pytest.approx(2.5 * 64 / 256)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampler: magic\nspace: {lr: [1]}", "line 1, sampler: expected one of tpe, random, grid"),
        ("sampler: grid\nspace:\n  lr: {low: 1e-4, high: 1}", "a grid needs a list"),
        ("space: {rate: [1]}", "no such option to search"),
        ("space: {lr: []}", "leaves nothing to choose"),
        ("space: {lr: {low: 1, high: 1}}", "low must be below high"),
        ("space: {lr: {low: 0, high: 1, log: true}}", "begin above 0"),
        ("space: {weight_decay: {relative: [0.1, 10]}}", "relative is for lr"),
        ("space: {lr: [1], base_lr: [2]}", "lr or base_lr"),
        ("space: {lr: [1]}\nfixed: {lr: 2}", "named once"),
        ("fixed: {lr: 1}", "expected a mapping|space is missing"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_space(file)


def test_the_packages_own_spaces():
    spaces = {name: read_space(path) for name, path in recipe_files("tune").items()}
    assert spaces["vpt-grid"].size() == 40
    assert spaces["vpt-grid-full"].size() == 16
    assert spaces["vpt-prompts"].size() is None
    assert DEFAULT.size() is None


# ------------------------------------------------------------------ the command
def test_from_search_to_final_run(place, tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("space:\n  lr: [1e-3, 1e-2]\n  method.bottleneck: [2, 4]\nsampler: grid\n")
    words = ["tune", "--model", str(place / "model"), "--method", "mona", "--data", str(place / "photos")]
    words += ["--epochs", "1", "--space", str(space), "--output", str(tmp_path / "search"), "--trials", "3"]
    assert main(words) == 0
    assert "trial 3/3: done" in capsys.readouterr().out
    best = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    rows = list(csv.DictReader((tmp_path / "search/trials.csv").open(newline="")))
    top = max(float(row["accuracy"]) for row in rows)
    chosen = next(row for row in rows if float(row["accuracy"]) == top)
    assert best["lr"] == float(chosen["lr"])
    assert best["method"][0]["bottleneck"] == int(chosen["method.bottleneck"])
    for results in (tmp_path / "search/trials").rglob("results.json"):
        assert json.loads(results.read_text())["test"] == {}, "a search must not look at test images"
    assert main(["train", "--config", str(tmp_path / "search/best.yaml"), "--output", str(tmp_path / "final")]) == 0
    final = json.loads((tmp_path / "final/results.json").read_text())
    assert final["test"]["accuracy"] >= 0
    assert final["val"]["accuracy"] == pytest.approx(top)

    assert main([*words[:-4], "--output", str(tmp_path / "search"), "--trials", "4", "--batch-size", "3"]) == 1
    assert "other options: batch_size was" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("space: {method.num_tokens: [1]}")
    assert main([*words[:-6], "--space", str(bad), "--output", str(tmp_path / "other"), "--trials", "1"]) == 1
    assert "has no setting 'num_tokens'" in capsys.readouterr().err


def test_what_decides_follows_the_task(place, tmp_path, capsys):
    """mAP where images have several labels; a metric that the task lacks, or no validation, is an error."""
    photos = sorted((place / "photos").rglob("*.png"))[:24]
    rows = [
        f"{photo},{'warm;dark' if i % 2 else 'cold'},{('train', 'val', 'test')[i % 3]}"
        for i, photo in enumerate(photos)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    words = ["tune", "--model", str(place / "model"), "--method", "linear", "--data", str(tmp_path / "labels.csv")]
    words += ["--epochs", "1", "--batch-size", "4", "--trials", "1"]
    assert main([*words, "--output", str(tmp_path / "search")]) == 0
    assert "done mAP" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "other"), "--metric", "accuracy"]) == 1
    assert "no validation metric 'accuracy'; this task has loss, mAP" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "joined"), "--protocol", "trainval"]) == 1
    assert "needs validation images" in capsys.readouterr().err
