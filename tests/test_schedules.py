"""Learning rates once an epoch, with a constant warm-up, as CoOp and those after it train; AdamW's eps."""

import json

import pytest
import torch
from reference import load_json
from torch import nn
from toy_training import QUIET, Interrupted, adapted_task, interrupt_at, splits

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data import Splits
from deltalens.studies.protocol import protocol_text
from deltalens.studies.study_reader import read_study
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.loaders import training_loader
from deltalens.training.optim import make_optimizer
from deltalens.training.schedule import RateSchedule

# name in the published rates -> (rate, epochs, epochs of warm-up)
PUBLISHED = {
    "mma_base2new": (0.0015, 5, 0),
    "mma_1ep": (0.0015, 1, 0),
    "coop_50": (0.002, 50, 1),
    "coop_200": (0.002, 200, 1),
    "cocoop_10": (0.002, 10, 1),
    "maple_5": (0.0035, 5, 1),
    "maple_xd_2": (0.0026, 2, 1),
    "rpo_15": (0.01, 15, 1),
    "lasp_25": (0.032, 25, 3),
}
STEPS = 3  # of an epoch


def rates(peak, epochs, warmup, warmup_lr=1e-5, **more):
    """What an optimiser has in each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = RateSchedule(STEPS * epochs, epochs, warmup, kind="epoch", warmup_lr=warmup_lr, **more)
    scheduler, seen = schedule.scheduler(optimizer, [peak]), []
    for _ in range(STEPS * epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert all(seen[i] == seen[i // STEPS * STEPS] for i in range(len(seen)))
    return seen[::STEPS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_of_the_official_codes(name):
    assert rates(*PUBLISHED[name]) == pytest.approx(load_json("clip_protocol_lr")[name], rel=1e-9)


def test_rates_in_numbers():
    assert rates(0.0015, 5, 0) == pytest.approx([1.5e-3, 1.357e-3, 9.82e-4, 5.18e-4, 1.43e-4], rel=2e-3)
    assert rates(0.0035, 5, 1) == pytest.approx([1e-5, 0.0035, 0.00317, 0.00229, 0.00121], rel=2e-3)
    assert rates(1.0, 4, 2, warmup_lr=None) == pytest.approx([1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2])  # linear
    assert rates(1.0, 2, 9) == pytest.approx([1e-5, 1])  # at least one epoch is no warm-up
    assert rates(1.0, 2, 0, least=0.1)[1] == pytest.approx(0.55)


def test_a_constant_warm_up_of_steps():
    schedule = RateSchedule(20, 2, 0.5, warmup_lr=0.125)
    plain = RateSchedule(20, 2, 0.5)
    found = [schedule.factor(step, 0.25) for step in range(20)]
    assert found[:5] == [0.5] * 5
    assert found[5:] == [plain.factor(step, 0.25) for step in range(5, 20)]


def test_every_group_warms_up_at_that_rate():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 0.1), strict=True)])
    schedule = RateSchedule(4, 4, 1, kind="epoch", warmup_lr=1e-5).scheduler(optimizer, [1.0, 0.1])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-5])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.0, 0.1])


def factors_of_torch(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def one_weight():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_a_line_and_steps_are_torchs():
    """mmsegmentation's polynomial of power 1, and mmdetection's steps after 8 and 11 of 12 epochs."""
    line = RateSchedule(20, 4, decay="linear")
    expected = factors_of_torch(torch.optim.lr_scheduler.PolynomialLR(one_weight(), 20, power=1), 20)
    assert [line.factor(step, 1.0) for step in range(20)] == pytest.approx(expected)
    steps = RateSchedule(60, 12, decay="steps", decay_at=(8, 11))
    expected = factors_of_torch(torch.optim.lr_scheduler.MultiStepLR(one_weight(), [8 * 5, 11 * 5]), 60)
    assert [steps.factor(step, 1.0) for step in range(60)] == pytest.approx(expected)


def test_a_line_and_steps_warm_up_and_end():
    line = RateSchedule(10, 2, 0.4, least=0.2, decay="linear")
    assert [line.factor(step, 1.0) for step in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.6])
    assert line.factor(10, 1.0) == pytest.approx(0.2)
    steps = RateSchedule(40, 4, 1, decay="steps", decay_at=(2, 3.5))  # epochs from the start, warm-up included
    found = [steps.factor(step, 1.0) for step in (4, 10, 19, 20, 34, 35, 39)]
    assert found == pytest.approx([5 / 11, 1, 1, 0.1, 0.1, 0.01, 0.01])
    by_epoch = RateSchedule(8, 4, 1, kind="epoch", decay="linear")
    assert [by_epoch.factor(step, 1.0) for step in range(0, 8, 2)] == pytest.approx([0.5, 1, 0.75, 0.5])


MAPLE = {"epochs": 5, "warmup_epochs": 1, "schedule": "epoch", "warmup_lr": 1e-5, "optimizer": "sgd"}


def test_fit_uses_them_and_says_them():
    results = fit(adapted_task(), splits(), TrainingSettings(**QUIET | MAPLE | {"lr": 0.0035}))
    wanted = [1e-5, 0.0035, 0.0031657797, 0.0022907797, 0.0012092203]
    assert [row["lr"] for row in results["history"]] == pytest.approx(wanted)


@pytest.mark.parametrize(("stop_at", "every"), [(11, 0), (14, 2)])
def test_resume_is_exact(stop_at, every, tmp_path):
    settings = TrainingSettings(**QUIET | MAPLE | {"epochs": 4}, checkpoint_every_steps=every)
    whole, killed, resumed = (adapted_task(dl.LinearConfig()) for _ in range(3))
    expected = fit(whole, splits(), settings)
    interrupt_at(killed, stop_at)
    with pytest.raises(Interrupted):
        fit(killed, splits(), settings, tmp_path)
    results = fit(resumed, splits(), settings, tmp_path, resume=True)
    assert [row["lr"] for row in results["history"]] == [row["lr"] for row in expected["history"]]
    assert torch.equal(whole.model.head.weight, resumed.model.head.weight)


def test_eps_of_adamw():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("adamw", [{"params": [weight], "lr": 1.0, "weight_decay": 0.0}], eps=1.0)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(-0.5)  # -1 / (1 + eps)
    moved = {}
    for eps in (1e-8, 1e3):
        task = adapted_task(dl.LinearConfig())
        start = task.model.head.weight.detach().clone()
        fit(task, splits(), TrainingSettings(**QUIET | {"epochs": 1, "eps": eps}))
        moved[eps] = float((task.model.head.weight.detach() - start).norm())
    assert moved[1e3] < 1e-3 * moved[1e-8]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"schedule": "batch"}, "schedule must be step or epoch, got 'batch'"),
        ({"schedule": "epoch", "warmup_epochs": 0.5}, "warmup_epochs must be a whole number"),
        ({"warmup_lr": 0.0}, "warmup_lr must be positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"decay": "poly"}, "decay must be one of cosine, linear, steps, got 'poly'"),
        ({"decay": "steps"}, r"decay_at names the epochs of decay='steps', got \[\] with decay='steps'"),
        ({"decay_at": (3,)}, r"decay_at names the epochs of decay='steps', got \[3\] with decay='cosine'"),
        ({"decay": "steps", "decay_at": (8, 10)}, r"decay_at must lie within the 10 epochs, got \[8, 10\]"),
        ({"decay": "steps", "decay_at": (8,), "min_lr": 0.1}, "min_lr is where a cosine or a line ends"),
    ],
)
def test_mistakes(wrong, match):
    with pytest.raises(ValueError, match=match):
        TrainingSettings(**wrong)


@pytest.mark.parametrize(("images", "batch", "steps"), [(8000, 128, 62), (80, 16, 5), (10, 16, 1)])
def test_an_incomplete_last_batch_is_left_out_as_published(images, batch, steps):
    """500 classes of 16 images in batches of 128 are 62 steps; fewer images than a batch are one."""
    assert len(training_loader(torch.utils.data.TensorDataset(torch.zeros(images)), batch, seed=0)) == steps


# ------------------------------------------------------------------ in studies and on the command line
STUDY = """
backbones: b
methods:
  MaPLe:
    method: maple
    training: {lr: 0.0035, epochs: 5, schedule: epoch, warmup_epochs: 1, warmup_lr: 1e-5, eps: 1e-4}
datasets: {d: here}
training: {schedule: epoch, warmup_lr: 1e-5}
"""


def test_a_study_says_them(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    study = read_study(tmp_path / "study.yaml")
    settings = study.training_of(study.variants[0]).settings(lr=0.0035, seed=0)
    assert (settings.schedule, settings.warmup_lr, settings.eps) == ("epoch", 1e-5, 1e-4)
    text = protocol_text(study)
    assert "warm-up of 1 at 1e-05 and a cosine to 0 % of the rate, changed once an epoch" in text
    assert "schedule epoch, warmup_epochs 1, warmup_lr 1e-05, eps 0.0001" in text
    (tmp_path / "steps.yaml").write_text(
        STUDY.replace("training: {schedule: epoch, warmup_lr: 1e-5}", "training: {decay: steps, decay_at: [2, 4.5]}")
    )
    study = read_study(tmp_path / "steps.yaml")
    assert study.training.settings(lr=1.0, seed=0).decay_at == (2, 4.5)
    assert "and a tenth of the rate from each of the epochs 2, 4.5 on" in protocol_text(study)
    for wrong, message in {
        "decay_at: 8": r"line 8, training\.decay_at: expected a list of numbers, got 8",
        "decay: poly": r"line 8, training\.decay: decay must be one of",
        "decay: steps, decay_at: [21]": r"line 8, training\.decay_at: decay_at must lie within the 20 epochs",
        "schedule: batch": r"line 8, training\.schedule: schedule must be step or epoch",
        "warmup_lr: [1]": r"line 8, training\.warmup_lr: expected a number",
        "schedule: epoch, warmup_epochs: 0.5": r"line 8, training\.warmup_epochs: .*whole number",
    }.items():
        text = STUDY.replace("training: {schedule: epoch, warmup_lr: 1e-5}", f"training: {{{wrong}}}")
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(tmp_path / "wrong.yaml")


def test_on_the_command_line(tmp_path, monkeypatch):
    from deltalens.cli import train

    def task_of_three_colours(options, methods, data):
        data.train, data.val, data.test = (getattr(splits(), part) for part in ("train", "val", "test"))
        task = adapted_task(methods)
        return ClassificationTask(task.model, data.class_names)

    monkeypatch.setattr(train, "read_images", lambda options: Splits(None, None, ["a", "b", "c"]))
    monkeypatch.setattr(train, "build_task", task_of_three_colours)
    words = ["train", "--data", "x", "--method", "linear", "--output", str(tmp_path / "run"), "--epochs", "2"]
    words += ["--schedule", "epoch", "--warmup-lr", "1e-5", "--eps", "1e-4", "--lr", "0.01", "--workers", "0"]
    assert main(words) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["lr"] for row in results["history"]] == pytest.approx([1e-5, 0.01])
    assert results["settings"]["eps"] == 1e-4
    words = [*words[:5], "--output", str(tmp_path / "steps"), "--epochs", "3", "--lr", "0.01", "--workers", "0"]
    assert main([*words, "--warmup-epochs", "0", "--decay", "steps", "--decay-at", "[1, 2]"]) == 0
    results = json.loads((tmp_path / "steps/results.json").read_text())
    assert [row["lr"] for row in results["history"]] == pytest.approx([0.01, 0.001, 0.0001])
