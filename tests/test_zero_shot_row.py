"""The method zero_shot: the classifier as it is, through the runner and in files."""

import json

import pytest
import torch
from clip_models import NAMES, hf_model, zero_shot
from hub_cache import write_open_clip
from models import tiny_vit
from picture_folders import write_splits

import deltalens as dl
from deltalens.cli.main import main

PROBE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [zero_shot, lambda: zero_shot(clip=hf_model())])
@torch.no_grad()
def test_nothing_changes_nothing_is_trained_and_classes_may_change(make):
    plain = make().eval()(PROBE)
    model = dl.attach(make(), dl.ZeroShotConfig()).eval()
    torch.testing.assert_close(model(PROBE), plain, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    assert dl.count_parameters(model).adapter == 0
    model.set_classes(NAMES[::-1])
    torch.testing.assert_close(model(PROBE), plain.flip(1), atol=1e-5, rtol=1e-5)


def test_it_is_for_classes_that_are_texts():
    with pytest.raises(TypeError, match=r"classifier made of class names.*class_names="):
        dl.attach(tiny_vit(), dl.ZeroShotConfig())


def test_train_runs_no_epoch_and_measures(tmp_path, capsys):
    write_open_clip(tmp_path / "model", depth=3)
    write_splits(tmp_path / "photos", 4, 2, 4)
    words = ["train", "--model", str(tmp_path / "model"), "--templates", "a {}.", "--method", "zero_shot"]
    assert main([*words, "--data", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert (found["history"], found["parameters"]["adapter"]) == ([], 0)
    assert set(found["val"]) == set(found["test"]) >= {"loss", "accuracy"}
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "photos")]) == 0
    said = capsys.readouterr().out
    assert f"{found['test']['accuracy']:.4f}" in said
    model = ["evaluate", "--model", str(tmp_path / "model"), "--templates", "a {}."]
    assert main([*model, "--data", str(tmp_path / "photos")]) == 0
    assert capsys.readouterr().out == said
