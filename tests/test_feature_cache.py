"""Training from kept features is the same training: equal results, files found again, refusals where it is not."""

import json

import numpy as np
import pytest
import torch
from models import tiny_convnext, tiny_resnet, tiny_swin, tiny_vit
from study_fixtures import STUDY, compare, results_of, write_study
from torch import nn
from toy_training import NAMES, QUIET, coloured, trained_tensors

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data import ArrayDataset, Splits
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.frozen_prefix import FeaturesCannotBeKept, find_cut

SETTINGS = TrainingSettings(**{**QUIET, "epochs": 2, "precision": "64", "accelerator": "cpu"})


def plain(count: int, seed: int) -> ArrayDataset:
    data = coloured(count, seed)
    data.transform = lambda image: image.double() / 255 - 0.5
    return data


def splits() -> Splits:
    return Splits(plain(40, 0), plain(12, 1), NAMES, plain(9, 2))


def task_of(make, config, **kwargs) -> ClassificationTask:
    model = make(num_classes=3, **kwargs)
    torch.manual_seed(3)
    return ClassificationTask(dl.attach(model, config), NAMES)


CASES = {
    "vit, linear": (tiny_vit, dl.LinearConfig(), "head"),
    "vit without class token, linear": (
        lambda **k: tiny_vit(class_token=False, global_pool="avg", **k),
        dl.LinearConfig(),
        "head",
    ),
    "vit, mlp head": (tiny_vit, dl.MLPConfig(layers=3), "head"),
    "vit, last block": (tiny_vit, dl.PartialConfig(), "blocks.2"),
    "vit, lora in the last block": (
        tiny_vit,
        dl.LoRAConfig(r=2, target_modules=r"blocks\.2\.attn\.(qkv|proj)"),
        "blocks.2",
    ),
    "swin, last block": (tiny_swin, dl.PartialConfig(), "layers.1.blocks.1"),
    "convnext, last block": (tiny_convnext, dl.PartialConfig(), "stages.3.blocks.0"),
    "resnet, linear": (tiny_resnet, dl.LinearConfig(), "fc"),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_uncached_run(case, tmp_path):
    make, config, cut = CASES[case]
    whole, kept = task_of(make, config), task_of(make, config)
    expected = fit(whole, splits(), SETTINGS)
    found = fit(kept, splits(), SETTINGS, cache_features=tmp_path)
    assert found["features"]["cut"] == cut
    assert found["features"]["computed"] == ["train", "val", "test"]
    for part in ("val", "test"):
        assert found[part] == pytest.approx(expected[part], rel=1e-9)
    wanted = trained_tensors(whole)
    for name, tensor in trained_tensors(kept).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-10)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(kept.model(x), whole.model(x))  # the hooks are gone: it reads images again


def test_the_network_below_the_cut_runs_once(tmp_path):
    task = task_of(tiny_vit, dl.LinearConfig())
    images_seen = []
    task.model.blocks[0].register_forward_pre_hook(lambda module, args: images_seen.append(len(args[0])))
    fit(task, splits(), SETTINGS, cache_features=tmp_path)
    steps = 2 * (40 // 8 + 2) + 2  # epochs * (training and validation batches), and the test
    assert sum(images_seen) <= 40 + 12 + 9 + steps + 10  # every image once, one dummy a step, and the trials


def test_files_are_found_again_by_a_run_with_another_rate_and_method(tmp_path):
    fit(task_of(tiny_vit, dl.LinearConfig()), splits(), SETTINGS, cache_features=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    again = fit(
        task_of(tiny_vit, dl.MLPConfig(layers=2)),
        splits(),
        TrainingSettings(**{**vars(SETTINGS), "lr": 0.5}),
        cache_features=tmp_path,
    )
    assert again["features"]["computed"] == []
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("what", ["backbone", "images", "precision", "cut"])
def test_anything_that_changes_the_features_makes_new_files(what, tmp_path):
    fit(task_of(tiny_vit, dl.LinearConfig()), splits(), SETTINGS, cache_features=tmp_path)
    task, data, settings = task_of(tiny_vit, dl.LinearConfig()), splits(), SETTINGS
    if what == "backbone":
        task.model.blocks[0].norm1.bias.data += 0.1
    elif what == "images":
        data.train.images = data.train.images.clone()
        data.train.images[3, 0, 0, 0] ^= 1
    elif what == "precision":
        settings = TrainingSettings(**{**vars(SETTINGS), "precision": "32"})
        for part in (data.train, data.val, data.test):
            part.transform = lambda image: image.float() / 255 - 0.5
    else:
        task = task_of(tiny_vit, dl.PartialConfig())
    found = fit(task, data, settings, cache_features=tmp_path)
    assert found["features"]["computed"] == (["train"] if what == "images" else ["train", "val", "test"])


class ReadsTheImageAgain(nn.Module):
    """Blocks, then a sum with the image's mean: features alone do not tell the output."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.body, self.num_classes = tiny_vit(num_classes=24), num_classes
        self.head = nn.Linear(24, num_classes)

    def forward(self, images):
        return self.head(self.body(images) + images.mean((1, 2, 3))[:, None]) + images.mean((1, 2, 3))[:, None]


REFUSED = {
    "bias of the first block": (tiny_vit, dl.BitFitConfig(), "patch_embed|blocks.0|norm"),
    "prompts everywhere": (tiny_vit, dl.VPTConfig(num_tokens=2), "blocks.0"),
    "mona everywhere": (tiny_swin, dl.MonaConfig(bottleneck=4), "layers.0"),
    "state from the images": (tiny_vit, dl.VPTConfig(num_tokens=2, depth=1, reverse=True), "training images"),
    "image read again": (ReadsTheImageAgain, dl.LinearConfig(), "reads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    make, config, message = REFUSED[case]
    with pytest.raises(FeaturesCannotBeKept, match=message):
        find_cut(task_of(make, config).model, torch.randn(2, 3, 32, 32))


def test_augmented_images_are_refused(tmp_path):
    data = splits()
    data.train = coloured(40, 0)
    with pytest.raises(FeaturesCannotBeKept, match="augmented"):
        fit(task_of(tiny_vit, dl.LinearConfig()), data, SETTINGS, cache_features=tmp_path)
    assert not any(tmp_path.iterdir())


def test_active_dropout_is_refused():
    config = dl.PartialConfig()
    model = task_of(lambda **k: tiny_vit(pos_drop_rate=0.1, **k), config).model
    assert find_cut(model, torch.randn(2, 3, 32, 32)) == "blocks.2"  # held in eval mode
    model.pos_drop.train()
    model.__dict__["_deltalens"].adapters["default"].configs  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltalens.lifecycle.state.State.frozen_mode", property(lambda self: "train"))
        with pytest.raises(FeaturesCannotBeKept, match="pos_drop"):
            find_cut(model, torch.randn(2, 3, 32, 32))


def test_transform_without_augmentation_has_nothing_random():
    from deltalens.data import train_transform

    preprocessing = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    transform = train_transform(preprocessing, min_crop=1, hflip=0)
    for shape in ((33, 32), (64, 65), (20, 90)):
        image = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
        assert len({transform(image).numpy().tobytes() for _ in range(20)}) == 1


def test_a_study_keeps_features_where_it_can(place, tmp_path):
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0]").replace("warmup_epochs: 0", "min_crop: 1, hflip: 0")
    file = write_study(place, tmp_path, text)
    assert compare(place, file, tmp_path / "plain") == 0
    assert compare(place, file, tmp_path / "kept", "--cache-features", str(tmp_path / "features")) == 0
    expected, found = results_of(tmp_path / "plain"), results_of(tmp_path / "kept")
    assert found.keys() == expected.keys()
    assert {name.split("/")[2] for name, results in found.items() if "features" in results} == {"Linear"}
    computed = [results["features"]["computed"] for results in found.values() if "features" in results]
    assert sorted(map(len, computed))[:1] == [0]  # the second rate reads what the first one left
    for name, results in expected.items():
        assert found[name]["val"]["loss"] == pytest.approx(results["val"]["loss"], rel=1e-4), name


def test_train_says_when_it_cannot(place, tmp_path, capsys):
    words = ["train", "--model", str(place / "model"), "--data", str(place / "photos"), "--epochs", "1"]
    words += ["--output", str(tmp_path / "out"), "--cache-features", str(tmp_path / "features"), "--method", "linear"]
    assert main(words) != 0
    assert "--min-crop 1 --hflip 0" in capsys.readouterr().err
    assert main([*words, "--min-crop", "1", "--hflip", "0"]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["features"]["cut"] == "head"
