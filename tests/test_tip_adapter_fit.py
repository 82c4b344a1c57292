"""Tip-Adapter in the runner, on the command line and in studies: no epochs, alpha and beta from validation images."""

import copy
import json
from pathlib import Path

import pytest
import torch
from clip_models import NAMES, zero_shot
from hub_cache import write_open_clip
from picture_folders import write_pictures
from test_tip_adapter import support

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.splits import Splits
from deltalens.lifecycle.cache_search import search_cache
from deltalens.methods import TipAdapterConfig
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.frozen_prefix import FeaturesCannotBeKept
from deltalens.training.loaders import evaluation_loader, preparation_loader

QUIET = {"accelerator": "cpu", "workers": 0, "progress": False, "batch_size": 10, "weight_decay": 0.0}


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        self.images, self.labels = support(count, seed=seed)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


TRAIN, VAL, TEST = Pictures(20, 3), Pictures(30, 6), Pictures(30, 7)


def data(val=VAL):
    return Splits(TRAIN, val, list(NAMES), TEST)


def task(**settings):
    torch.manual_seed(0)
    return ClassificationTask(dl.attach(zero_shot(), TipAdapterConfig(passes=1, **settings)), NAMES)


def by_hand(**settings):
    """(model, found): prepared, and searched on the validation images."""
    model = dl.attach(zero_shot(), TipAdapterConfig(passes=1, **settings))
    dl.prepare(model, preparation_loader(TRAIN, 10, 0))
    return model, search_cache(model, evaluation_loader(VAL, 10))


@torch.no_grad()
def accuracy(model, pictures):
    return float((model.eval()(pictures.images).argmax(1) == pictures.labels).float().mean())


def test_no_epochs_are_run_and_alpha_and_beta_are_searched(tmp_path):
    trained = task(alpha=0.0)
    results = fit(trained, data(), TrainingSettings(epochs=3, **QUIET), tmp_path)
    model, found = by_hand(alpha=0.0)
    assert found.accuracy > found.before
    assert results["history"] == []
    assert results["chosen"] == {"tip_adapter": {"alpha": found.alpha, "beta": found.beta}}
    assert results["val"]["accuracy"] == pytest.approx(found.accuracy)
    assert results["test"]["accuracy"] == pytest.approx(accuracy(model, TEST))
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "metrics.csv").exists()
    card = (tmp_path / "README.md").read_text()
    assert f'"alpha": {found.alpha}' in card
    assert f'"beta": {found.beta}' in card
    again = dl.from_pretrained(tmp_path, zero_shot())
    with torch.no_grad():
        assert torch.equal(again(TEST.images), trained.model(TEST.images))
        torch.testing.assert_close(again(TEST.images), model(TEST.images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("val", "search"), [(None, True), (VAL, False)])
def test_without_validation_images_or_search_they_stay(val, search):
    trained = task(alpha=0.5, beta=2.0, search=search)
    results = fit(trained, data(val), TrainingSettings(epochs=1, **QUIET))
    assert "chosen" not in results
    (cache,) = trained.model.live("logits")
    assert (cache.alpha, cache.beta) == (0.5, 2.0)
    assert results["test"]["accuracy"] == pytest.approx(accuracy(trained.model, TEST))
    assert ("accuracy" in results["val"]) == (val is not None)


def test_trained_keys_are_searched_after_training():
    trained = task(alpha=0.0, train_keys=True, highest_alpha=2.0)
    results = fit(trained, data(), TrainingSettings(epochs=2, lr=1e-3, **QUIET))
    assert len(results["history"]) == 2
    chosen = results["chosen"]["tip_adapter"]
    assert 0.1 <= chosen["alpha"] < 2
    assert results["val"]["accuracy"] > results["history"][-1]["val_accuracy"]  # CLIP's own, at alpha 0
    assert results["val"]["accuracy"] == pytest.approx(accuracy(trained.model, VAL))
    assert results["test"]["accuracy"] == pytest.approx(accuracy(trained.model, TEST))
    assert trained.model._deltalens.adapters["default"].configs[0].alpha == chosen["alpha"]


def test_a_run_that_was_stopped_behind_its_training(tmp_path):
    settings = TrainingSettings(epochs=2, lr=1e-3, **QUIET)
    expected = fit(task(train_keys=True), data(), settings)

    def stop():
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        fit(task(train_keys=True), data(), settings, tmp_path, more_results=stop)
    results = fit(task(train_keys=True), data(), settings, tmp_path, resume=True)
    assert (results["chosen"], results["val"], results["test"]) == tuple(
        expected[key] for key in ("chosen", "val", "test")
    )


def test_in_a_loop_of_ones_own():
    trained = task(alpha=0.0).model
    dl.prepare(trained, preparation_loader(TRAIN, 10, 0))
    other = copy.deepcopy(trained)
    chosen = dl.finish(trained.train(), evaluation_loader(VAL, 10))
    _, found = by_hand(alpha=0.0)
    assert chosen == {"tip_adapter": {"alpha": found.alpha, "beta": found.beta}}
    assert trained.training
    search_cache(other, evaluation_loader(VAL, 10))
    with torch.no_grad():
        assert torch.equal(trained.eval()(TEST.images), other.eval()(TEST.images))
    assert dl.finish(dl.attach(zero_shot(), dl.BitFitConfig()), None) == {}


def test_errors():
    with pytest.raises(ValueError, match="highest_beta must be above that"):
        TipAdapterConfig(highest_beta=0.05)
    with pytest.raises(ValueError, match="takes one device: set devices=1"):
        fit(task(), data(), TrainingSettings(**QUIET | {"devices": 2}))
    model = task().model
    dl.attach(model, TipAdapterConfig(passes=1), "second")
    dl.set_adapter(model, ("default", "second"))
    dl.prepare(model, preparation_loader(TRAIN, 10, 0))
    with pytest.raises(ValueError, match="2 Tip-Adapters are active"):
        dl.finish(model, evaluation_loader(VAL, 10))


def test_features_are_not_kept(tmp_path):
    """Keys are made of the images: a study then trains as ever."""
    for keys in (False, True):
        with pytest.raises(FeaturesCannotBeKept, match="tip_adapter takes state from the training images itself"):
            fit(task(train_keys=keys), data(), TrainingSettings(**QUIET), cache_features=tmp_path)


# ------------------------------------------------------------------ commands
@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("place")
    write_open_clip(root / "model", depth=2)
    write_pictures(root / "photos", 8)
    return root


def test_train_and_evaluate(place, tmp_path, capsys):
    words = ["train", "--model", str(place / "model"), "--data", str(place / "photos"), "--output", str(tmp_path / "t")]
    words += ["--templates", "a photo of a {}.", "--method", "tip_adapter", "--method.passes", "2", "--workers", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "nothing is trained: the adapter is made of the training images" in said
    assert "tip_adapter chose alpha" in said
    results = json.loads((tmp_path / "t/results.json").read_text())
    words = ["evaluate", str(tmp_path / "t"), "--data", str(place / "photos"), "--output", str(tmp_path / "e.json")]
    assert main(words) == 0
    assert json.loads((tmp_path / "e.json").read_text())["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)


STUDY = """
backbones: {{model: {model}, label: CLIP, options: {{templates: ["a photo of a {{}}."]}}}}
datasets: {{photos: {data}}}
methods:
  Tip-Adapter: {{method: tip_adapter, passes: 1{search}}}
  Tip-Adapter-F: {{method: tip_adapter, passes: 1, train_keys: true}}
seeds: [0]
training: {{epochs: 1, batch_size: 8, warmup_epochs: 0, eps: 1e-4}}
lr: {{relative: [0.5, 1]}}
"""


@pytest.mark.parametrize("search", ["", pytest.param(", search: null", marks=pytest.mark.slow)])
def test_in_a_study(place, tmp_path, search):
    (tmp_path / "study.yaml").write_text(STUDY.format(model=place / "model", data=place / "photos", search=search))
    assert main(["compare", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    for row in ("Tip-Adapter", "Tip-Adapter-F"):
        results = json.loads((tmp_path / f"out/runs/CLIP/photos/{row}/seed-0/results.json").read_text())
        assert set(results["chosen"]["tip_adapter"]) == {"alpha", "beta"}
        assert "accuracy" in results["test"]
        adapter = dl.from_pretrained(tmp_path / f"out/runs/CLIP/photos/{row}/seed-0")
        assert adapter.live("logits")[0].alpha == results["chosen"]["tip_adapter"]["alpha"]
