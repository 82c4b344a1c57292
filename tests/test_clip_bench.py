"""`deltalens bench clip`: the published forms are timed beside ours, and both are one function."""

import json
from dataclasses import replace

import pytest
import torch

import deltalens as dl
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.cli.main import main
from deltalens.studies import clip_bench
from deltalens.studies.bench_report import Row, Section
from deltalens.studies.benchmarks import FULL, Options
from deltalens.studies.clip_bench import FROZEN, check_same_gradients, class_names, targets
from deltalens.studies.plain_clip import plain_coop, plain_mma


@pytest.fixture(scope="module")
def tiny() -> ZeroShotClassifier:
    torch.manual_seed(0)
    return clip_bench._tiny(class_names(5)).requires_grad_(False)


def adapted(tiny, method):
    return dl.attach(clip_bench._sharing(tiny), method), clip_bench._sharing(tiny).clip


def test_class_names_are_spread_over_imagenet():
    names = class_names(100)
    assert len(set(names)) == 100
    assert names[0] == "tench"
    assert "orange" in names
    assert len(set(class_names(1000))) == 1000
    with pytest.raises(ValueError, match="--classes must be 1 to 1000, got 1001"):
        class_names(1001)


def test_contenders_share_one_clip(tiny):
    ours, clip = adapted(tiny, dl.MMAConfig(start=2))
    plain = plain_mma(clip, ours)
    assert plain.clip.visual.conv1.weight is ours.clip.visual.conv1.weight
    ours_trained, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (ours, plain))
    assert len(ours_trained) == len(theirs)
    assert not {id(p) for p in ours_trained} & {id(p) for p in theirs}


@pytest.mark.parametrize("method", [dl.MMAConfig(start=2), dl.CoOpConfig(), dl.CoCoOpConfig()])
def test_different_gradients_are_not_compared(tiny, method):
    torch.manual_seed(0)
    ours, clip = adapted(tiny, method)
    plain = (plain_mma if isinstance(method, dl.MMAConfig) else plain_coop)(clip, ours)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    check_same_gradients(images, labels, plain, ours)
    with torch.no_grad():
        next(p for p in plain.parameters() if p.requires_grad).mul_(-1)
    with pytest.raises(RuntimeError, match="not the same function"):
        check_same_gradients(images, labels, plain, ours)


def test_published_form_runs_every_word(tiny):
    """All 77 positions in every step of training, texts once in evaluation."""
    ours, clip = adapted(tiny, dl.MMAConfig(start=2))
    plain, seen = plain_mma(clip, ours), []
    clip.transformer.resblocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    images = torch.randn(1, 3, 32, 32)
    for _ in range(2):
        plain.train()(images)
    assert seen == [77, 77]
    with torch.no_grad():
        for _ in range(2):
            plain.eval()
            plain(images)
            plain(images)
    assert seen == [77] * 4


def test_command(tmp_path, capsys):
    words = ["bench", "clip", "--quick", "--rounds", "1", "--classes", "4", "--threads", "1", "--device", "cpu"]
    assert main([*words, "--check", "--json", str(tmp_path / "clip.json")]) == 0
    assert "CoCoOp, training step, batch 2" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "clip.json").read_text())["reports"]
    assert report["title"] == "CLIP"
    assert report["settings"]["classes"] == 4
    assert report["targets"] == []  # they are promises about ViT-B/16 with 100 classes and batch 16
    steps, speeds, coop, cocoop = ({row["name"]: row for row in section["rows"]} for section in report["sections"])
    assert list(steps) == [FULL, FROZEN, "plain", "deltalens"]
    assert steps[FROZEN]["saved_bytes"] == 0  # a forward only
    assert set(steps["deltalens"]["ratios"]) == {"full", "zero-shot", "plain"}
    assert steps["deltalens"]["saved_bytes"] < 0.6 * steps["plain"]["saved_bytes"] < 0.6 * steps[FULL]["saved_bytes"]
    assert list(speeds) == [FROZEN, "plain", "deltalens"]
    assert coop["deltalens"]["saved_bytes"] < 0.3 * coop["plain"]["saved_bytes"]
    assert list(cocoop) == ["plain", "deltalens", "deltalens, image by image"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "0"], "--classes must be at least 1"),
        (["--classes", "2000"], "--classes must be 1 to 1000"),
        (["--img-size", "32"], "images of the model's own size"),
        (["--model", "deltalens/vit-mini"], "has no text tower"),
    ],
)
def test_command_says_what_is_wrong(words, said, capsys):
    assert main(["bench", "clip", "--quick", "--device", "cpu", *words]) == 1
    assert said in capsys.readouterr().err


def test_targets_are_about_one_setting():
    rows = [Row("plain", 2.0, saved_bytes=100), Row("deltalens", 1.0, {"plain": 0.5}, saved_bytes=70)]
    steps = Section("MMA, training step", rows, ("plain", "plain"))
    setting = Options(model="open_clip/ViT-B-16", batch_size=16, classes=100)
    time, saved = targets(setting, 224, steps)
    assert (time.value, time.limit, time.met) == (0.5, 0.65, True)
    assert (saved.value, saved.limit, saved.met) == (0.7, 0.6, False)
    for changes in ({"batch_size": 8}, {"classes": 99}, {"model": "open_clip/ViT-B-32"}):
        assert targets(replace(setting, **changes), 224, steps) == []
    assert targets(setting, 336, steps) == []
