"""Tasks, optimiser groups, schedule, and the runner: exact resume, bad losses, frozen modules, files."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_vit
from torch import nn
from toy_training import NAMES, QUIET, Interrupted, adapted_task, coloured, interrupt_at, splits

import deltalens as dl
from deltalens.data import Splits
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.callbacks import NonFiniteLossError
from deltalens.training.loaders import training_loader
from deltalens.training.optim import default_learning_rate, make_optimizer, parameter_groups
from deltalens.training.schedule import RateSchedule, warmup_decay_factor


# ------------------------------------------------------------------ the task
def test_task_in_a_plain_loop():
    task = adapted_task()
    optimizer = make_optimizer("adamw", parameter_groups(task, 1e-2, 0.0))
    losses = []
    for epoch in range(6):
        loader = training_loader(coloured(40, 0), 8, seed=0, start=(epoch, 0))
        task.train()
        for batch in loader:
            optimizer.zero_grad()
            result = task(batch)
            result["loss"].backward()
            optimizer.step()
            losses.append(result["loss"].item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert result["output"].shape == (8, 3)


def test_task_with_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    task = adapted_task()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-2)
    loader = torch.utils.data.DataLoader(coloured(40, 0), 8)
    task, optimizer, loader = accelerator.prepare(task, optimizer, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            optimizer.zero_grad()
            loss = task(batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


class Penalised(dl.LinearConfig):
    """A linear probe with a loss term of its own."""

    name = "penalised"

    def losses(self, model, output, batch):
        return {"size": output.square().mean()}


def test_method_losses_count_in_training_only():
    task = ClassificationTask(dl.attach(tiny_vit(num_classes=3), Penalised()), NAMES, label_smoothing=0.2)
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    result = task.train()(batch)
    plain = nn.functional.cross_entropy(result["output"], batch[1], label_smoothing=0.2)
    assert torch.allclose(result["loss"], plain + result["output"].square().mean())
    assert set(result["losses"]) == {"cross_entropy", "penalised.size"}
    assert set(task.eval()(batch)["losses"]) == {"cross_entropy"}


def test_class_counts_must_agree():
    with pytest.raises(ValueError, match=r"3 outputs and the data 4 classes.*num_classes=4"):
        ClassificationTask(tiny_vit(num_classes=3), [*NAMES, "d"])
    features = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 3\)"):
        ClassificationTask(features, NAMES)((torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])))


def test_metrics_and_decoding():
    task = ClassificationTask(nn.Identity(), [f"class {i}" for i in range(7)])
    logits = torch.eye(7)[[0, 1, 2, 2, 2, 2]] * 4
    labels = torch.tensor([0, 1, 2, 2, 2, 3])
    metrics = task.new_metrics()
    task.update_metrics(metrics, {"output": logits}, (None, labels))
    values = metrics.compute()
    assert values["accuracy"] == pytest.approx(5 / 6)
    assert values["mean_class_accuracy"] == pytest.approx(3 / 4)
    assert set(values) == {"accuracy", "mean_class_accuracy", "top5_accuracy"}
    (best, second), *_ = task.decode(logits[1:2], topk=2)
    assert best == ("class 1", pytest.approx(math.exp(4) / (math.exp(4) + 6)))
    assert second[1] < best[1]
    assert "top5_accuracy" not in ClassificationTask(nn.Identity(), NAMES).new_metrics()


def test_a_perfect_first_batch_does_not_tie_top5_to_top1():
    """torchmetrics shares the state of metrics that agree on the first batch, unless told not to."""
    task = ClassificationTask(nn.Identity(), [f"class {i}" for i in range(7)])
    metrics = task.new_metrics()
    task.update_metrics(metrics, {"output": torch.eye(7)[:3]}, (None, torch.tensor([0, 1, 2])))
    second_best = torch.tensor([[0.0, 1, 2, 3, 4, 6, 5]])
    task.update_metrics(metrics, {"output": second_best}, (None, torch.tensor([6])))
    values = metrics.compute()
    assert values["accuracy"] == pytest.approx(3 / 4)
    assert values["top5_accuracy"] == 1


# ------------------------------------------------------------------ optimiser and schedule
def test_weight_decay_acts_on_matrices_of_layers_only():
    task = adapted_task([dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2), dl.BitFitConfig()])
    groups = parameter_groups(task, 1e-3, 0.1)
    names = {group["weight_decay"]: group["names"] for group in groups}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight", "head.weight")) for name in names[0.1])
    assert any(name.endswith("embedding") for name in names[0.0])
    assert any(name.endswith("bias") for name in names[0.0])
    assert sorted(names[0.0] + names[0.1]) == sorted(n for n, p in task.named_parameters() if p.requires_grad)


def test_weight_decay_may_act_on_all_but_what_is_named():
    task = adapted_task([dl.VPTConfig(num_tokens=2), dl.BitFitConfig()])
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    for spared in ([], ["norm"], ["head.bias", "embedding"]):
        groups = parameter_groups(task, 1e-3, 0.1, spared)
        names = {group["weight_decay"]: set(group["names"]) for group in groups}
        assert names.get(0.0, set()) == {name for name in trained if any(text in name for text in spared)}
        assert names[0.1] == trained - names.get(0.0, set())
    rates = {"lr": 0.1, "weight_decay": 0.5, "optimizer": "sgd", "epochs": 1, "warmup_epochs": 0}
    weights = {}
    for spared in (None, ("head",)):
        task = adapted_task(dl.LinearConfig())
        fit(
            task,
            Splits(coloured(8, 0), coloured(4, 1), NAMES),
            TrainingSettings(**{**QUIET, **rates, "no_decay": spared}),
        )
        weights[spared] = task.model.head.weight.detach().norm()
    assert weights[None] < weights["head",]


def test_the_cosine_ends_at_a_share_of_the_rate():
    factors = [warmup_decay_factor(step, 3, 11, least=0.1) for step in range(12)]
    plain = [warmup_decay_factor(step, 3, 11) for step in range(12)]
    assert factors[:4] == plain[:4]
    assert factors[4:] == pytest.approx([0.1 + 0.9 * each for each in plain[4:]])
    assert factors[11] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="min_lr is a share of lr, between 0 and 1, got 2"):
        TrainingSettings(min_lr=2)
    with pytest.raises(ValueError, match="no_decay must be a list of texts"):
        TrainingSettings(no_decay="norm")
    moved = {}
    for least in (0.0, 1.0):  # constant
        task = adapted_task(dl.LinearConfig())
        start = task.model.head.weight.detach().clone()
        settings = TrainingSettings(
            **{**QUIET, "lr": 0.1, "optimizer": "sgd", "epochs": 2, "warmup_epochs": 0, "min_lr": least}
        )
        fit(task, Splits(coloured(16, 0), coloured(4, 1), NAMES), settings)
        moved[least] = (task.model.head.weight.detach() - start).norm()
    assert moved[1.0] > 1.2 * moved[0.0]


class FasterHead(dl.LinearConfig):
    """A linear probe that trains its head ten times as fast."""

    name = "faster_head"

    def lr_multipliers(self):
        return {"head.": 10.0}


def test_learning_rate_multipliers_of_a_method():
    task = adapted_task([FasterHead(), dl.MonaConfig(bottleneck=4)])
    rates = {name: group["lr"] for group in parameter_groups(task, 1e-3, 0.1) for name in group["names"]}
    assert {name for name, rate in rates.items() if rate == pytest.approx(1e-2)} == {
        "model.head.weight",
        "model.head.bias",
    }
    assert min(rates.values()) == 1e-3


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="attach an adapter"):
        parameter_groups(tiny_vit().requires_grad_(False), 1e-3, 0.1)


def test_default_learning_rates():
    for name in dl.list_methods():
        assert 1e-5 <= default_learning_rate([dl.make_config(name)]) <= 1e-1
    slow, fast = dl.FullConfig(), dl.LinearConfig()
    assert default_learning_rate([fast, slow]) == default_learning_rate([slow]) < default_learning_rate([fast])


def test_schedule():
    factors = [warmup_decay_factor(step, 3, 11) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(factors[3:]))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = RateSchedule(total_steps=4, epochs=1).scheduler(optimizer, [2.0])
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": -1.0}, {"precision": "8"}, {"optimizer": "lion"}, {"workers": -1}]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingSettings(**wrong)


# ------------------------------------------------------------------ the runner
def test_fit_learns_and_leaves_an_adapter(tmp_path):
    task = adapted_task()
    results = fit(task, splits(), TrainingSettings(epochs=6, **QUIET), tmp_path / "run")
    assert results["val"]["accuracy"] > 0.8
    assert results["test"]["accuracy"] > 0.8
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.csv",
        "results.json",
    }
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["val_accuracy"]) == results["val"]["accuracy"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert results["data"] == {"train": 40, "val": 12, "test": 9, "classes": 3}
    assert results["parameters"]["head"] == 24 * 3 + 3

    reloaded = dl.from_pretrained(tmp_path / "run", tiny_vit(num_classes=3))
    assert dl.class_names(reloaded) == NAMES
    assert dl.adapter_info(reloaded)["metrics"]["test accuracy"] == results["test"]["accuracy"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(reloaded(images), task.eval().model(images))


def test_fit_without_output_and_without_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Splits(coloured(16, 0), coloured(6, 1), NAMES)
    results = fit(adapted_task(), data, TrainingSettings(epochs=1, **QUIET))
    assert results["test"] == {}
    assert list(tmp_path.iterdir()) == []


def test_lightning_keeps_quiet(tmp_path, capfd, recwarn):
    fit(adapted_task(), splits(), TrainingSettings(epochs=2, **QUIET | {"progress": True}), tmp_path)
    captured = capfd.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  train_loss ")
    assert [str(warning.message) for warning in recwarn if "lightning" in str(warning.filename)] == []


@pytest.mark.parametrize(
    ("config", "frozen_dropout"), [(dl.LoRAConfig(dropout=0.1), False), (dl.MonaConfig(bottleneck=4), True)]
)
def test_frozen_modules_keep_their_mode_after_a_validation(config, frozen_dropout):
    """frozen_mode "eval" holds the backbone's dropout in eval mode in every epoch; inserted modules train."""
    task = adapted_task(config, proj_drop_rate=0.2)
    modes = []

    def record(module, inputs):
        model = module.model
        inserted = [m for name, m in model.named_modules() if "delta" in name.split(".") and isinstance(m, nn.Dropout)]
        modes.append((module.training, model.blocks[0].mlp.drop1.training, {m.training for m in inserted}))

    task.register_forward_pre_hook(record)
    fit(task, splits(), TrainingSettings(epochs=3, **QUIET))
    training = [mode for mode in modes if mode[0]]
    assert len(training) == 15
    assert set(map(str, training)) == {str((True, frozen_dropout, {True}))}
    assert {str(mode) for mode in modes if not mode[0]} == {str((False, False, {False}))}


def test_frozen_weights_do_not_move_and_are_not_in_checkpoints(tmp_path):
    task = adapted_task()
    before = {name: p.clone() for name, p in task.named_parameters() if not p.requires_grad}
    interrupt_at(task, 12)
    with pytest.raises(Interrupted):
        fit(task, splits(), TrainingSettings(epochs=4, **QUIET), tmp_path)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {f"task.{name}" for name, p in task.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters() if name in before)


# ------------------------------------------------------------------ bad losses
def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    data = splits()
    poisoned = data.train.transform
    seen = []

    def poison(image):
        seen.append(1)
        return poisoned(image) * (math.nan if len(seen) > 2 * 40 + 8 else 1)  # from the second step of the third epoch

    data.train.transform = poison
    settings = TrainingSettings(epochs=4, **QUIET)
    with pytest.raises(NonFiniteLossError, match=r"epoch 3, step 12.*last good checkpoint is .*last\.ckpt.*--resume"):
        fit(adapted_task(), data, settings, tmp_path)
    progress = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert progress["deltalens_progress"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in progress["state_dict"].values())
    results = fit(adapted_task(), splits(), settings, tmp_path, resume=True)
    assert results["val"] == fit(adapted_task(), splits(), settings)["val"]


def test_weights_ruined_by_the_last_step_of_an_epoch_are_not_kept(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"(validation loss is|training loss became)"):
        fit(adapted_task(), splits(), TrainingSettings(epochs=2, **QUIET | {"lr": 1e30}), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


# ------------------------------------------------------------------ options of the trainer
def test_bf16_and_clipping():
    results = fit(adapted_task(), splits(), TrainingSettings(epochs=5, precision="bf16", clip_grad=1.0, **QUIET))
    assert results["val"]["accuracy"] > 0.8


def test_sgd_and_warmup_longer_than_training():
    results = fit(adapted_task(), splits(), TrainingSettings(epochs=1, warmup_epochs=9, optimizer="sgd", **QUIET))
    assert math.isfinite(results["val"]["loss"])


@pytest.mark.slow
def test_compiled_training_equals_eager():
    eager = fit(adapted_task(dl.LoRAConfig()), splits(), TrainingSettings(epochs=1, **QUIET))
    compiled = fit(adapted_task(dl.LoRAConfig()), splits(), TrainingSettings(epochs=1, compile=True, **QUIET))
    assert compiled["val"]["loss"] == pytest.approx(eager["val"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """DDP over two CPU processes: one writes, metrics are those of all validation images."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from toy_training import *\n"
        "from deltalens.training import TrainingSettings, fit\n"
        "settings = TrainingSettings(epochs=2, devices=2, accelerator='cpu', **QUIET)\n"
        f"fit(adapted_task(), splits(), settings, {str(tmp_path / 'run')!r})\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=300, capture_output=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    reloaded = dl.from_pretrained(tmp_path / "run", tiny_vit(num_classes=3))
    val = splits().val
    correct = sum(
        int(reloaded(val.images[i : i + 1].float() / 255 - 0.45).argmax()) == val.labels[i] for i in range(len(val))
    )
    assert results["val"]["accuracy"] * 12 == pytest.approx(round(results["val"]["accuracy"] * 12))
    assert abs(correct - results["val"]["accuracy"] * 12) <= 2


@pytest.mark.slow
def test_mona_beats_the_linear_probe_on_real_images():
    root = Path(__file__).parents[1] / "../shared/data/cls/sign_digits"
    if not root.is_dir():
        pytest.skip("the data set sign_digits is not beside this repository")
    from deltalens.data import eval_transform, read_image_folder, train_transform

    accuracies = {}
    for config in (dl.LinearConfig(), dl.MonaConfig(bottleneck=16)):
        data = read_image_folder(root)
        torch.manual_seed(0)
        model = dl.create_backbone("deltalens/vit-mini", num_classes=len(data.class_names))
        dl.attach(model, config)
        data.train.transform = train_transform(dl.preprocessing(model), hflip=0)
        data.val.transform = data.test.transform = eval_transform(dl.preprocessing(model))
        settings = TrainingSettings(epochs=5, batch_size=32, lr=default_learning_rate([config]), progress=False)
        accuracies[config.name] = fit(ClassificationTask(model, data.class_names), data, settings)["test"]["accuracy"]
    assert accuracies["mona"] > accuracies["linear"] + 0.05
