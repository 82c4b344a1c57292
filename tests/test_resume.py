"""Stopped runs go on as if they had not been stopped; nothing is written over, nothing is half-written."""

import json
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import QUIET, Interrupted, adapted_task, interrupt_at, splits, trained_tensors

import deltalens as dl
from deltalens.lifecycle.atomic import atomic_path, remove_leftovers
from deltalens.training import TrainingSettings, fit

CONFIGS = {
    "mona": (dl.MonaConfig(bottleneck=4, dropout=0.3), {"drop_path_rate": 0.3}),
    "mona with batch norm": (dl.MonaConfig(bottleneck=4, norm="batch"), {}),
    "full": (dl.FullConfig(), {"proj_drop_rate": 0.2}),
    "vpt and lora": ([dl.VPTConfig(num_tokens=2, dropout=0.2), dl.LoRAConfig(r=2, dropout=0.2)], {}),
}


@pytest.mark.parametrize(("stop_at", "every"), [(7, 0), (6, 0), (9, 2), (10, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_at, every):
    check_resume(tmp_path, "mona", stop_at, every)


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "mona"])
def test_resume_with_other_methods(tmp_path, config):
    check_resume(tmp_path, config, stop_at=9, every=3)


def check_resume(folder: Path, name: str, stop_at: int, every: int) -> None:
    """Bit for bit: tensors, metrics and history, stopped within an epoch of 5 steps or right after one."""
    config, kwargs = CONFIGS[name]
    settings = TrainingSettings(epochs=3, checkpoint_every_steps=every, **QUIET)
    whole = adapted_task(config, **kwargs)
    expected = fit(whole, splits(), settings, folder / "whole")

    killed = adapted_task(config, **kwargs)
    interrupt_at(killed, stop_at)
    with pytest.raises(Interrupted):
        fit(killed, splits(), settings, folder / "killed")
    torch.rand(17)  # another process has another random state
    resumed = adapted_task(config, **kwargs)
    steps = []
    resumed.register_forward_pre_hook(lambda module, inputs: steps.extend([1] if module.training else []))
    results = fit(resumed, splits(), settings, folder / "killed", resume=True)

    last_saved = 5 if not every else (stop_at - 1) // every * every
    assert len(steps) == 15 - max(5, last_saved)
    assert results["val"] == expected["val"]
    assert results["test"] == expected["test"]
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r["history"]] for r in (results, expected)
    ]
    assert without_time[0] == without_time[1]
    first, second = (load_file(folder / run / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resume_of_a_finished_run_returns_its_results(tmp_path):
    settings = TrainingSettings(epochs=1, **QUIET)
    results = fit(adapted_task(), splits(), settings, tmp_path)
    task = adapted_task()
    before = trained_tensors(task)
    assert fit(task, splits(), settings, tmp_path, resume=True) == json.loads(json.dumps(results))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained_tensors(task).items())


def test_resume_with_a_lower_learning_rate_uses_it(tmp_path):
    killed = adapted_task()
    interrupt_at(killed, 6)
    with pytest.raises(Interrupted):
        fit(killed, splits(), TrainingSettings(epochs=3, **QUIET), tmp_path)
    results = fit(adapted_task(), splits(), TrainingSettings(epochs=3, **QUIET | {"lr": 1e-4}), tmp_path, resume=True)
    rates = [row["lr"] for row in results["history"]]
    assert rates[0] > 1e-3
    assert 0 < rates[1] < 1e-4


def test_resume_with_another_method_is_an_error(tmp_path):
    killed = adapted_task()
    interrupt_at(killed, 6)
    with pytest.raises(Interrupted):
        fit(killed, splits(), TrainingSettings(epochs=3, **QUIET), tmp_path)
    with pytest.raises(ValueError, match="other tensors than this run trains"):
        fit(adapted_task(dl.LoRAConfig()), splits(), TrainingSettings(epochs=3, **QUIET), tmp_path, resume=True)


def test_runs_are_not_written_over(tmp_path):
    settings = TrainingSettings(epochs=1, **QUIET)
    fit(adapted_task(), splits(), settings, tmp_path / "run")
    with pytest.raises(FileExistsError, match="finished run"):
        fit(adapted_task(), splits(), settings, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    fit(adapted_task(), splits(), settings, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not empty \(README\.md\)"):
        fit(adapted_task(), splits(), settings, other)
    with pytest.raises(NotADirectoryError):
        fit(adapted_task(), splits(), settings, other / "README.md")
    with pytest.raises(ValueError, match="pass one of them"):
        fit(adapted_task(), splits(), settings, tmp_path / "run", overwrite=True, resume=True)
    assert (other / "README.md").read_text() == "mine"


def run_until_killed(output: Path) -> None:
    """Train, and die of SIGKILL when the second checkpoint is written but not yet renamed."""
    saves = []
    replace = os.replace

    def replace_or_die(source, target):
        if str(target).endswith("last.ckpt"):
            saves.append(target)
            if len(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    fit(adapted_task(), splits(), TrainingSettings(epochs=3, **QUIET), output)


def test_kill_minus_nine_while_saving(tmp_path):
    """A process killed in the middle of writing a checkpoint leaves the one before, and the run goes on from it."""
    output = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(output,))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in output.glob(".*.tmp")] != []
    assert torch.load(output / "last.ckpt", weights_only=True)["deltalens_progress"]["epoch"] == 1
    results = fit(adapted_task(), splits(), TrainingSettings(epochs=3, **QUIET), output, resume=True)
    expected = fit(adapted_task(), splits(), TrainingSettings(epochs=3, **QUIET))
    assert results["val"] == expected["val"]
    assert list(output.glob(".*.tmp")) == []


def test_the_time_of_a_resumed_run_holds_the_earlier_epochs(tmp_path):
    killed = adapted_task()
    interrupt_at(killed, 6)
    with pytest.raises(Interrupted):
        fit(killed, splits(), TrainingSettings(epochs=2, **QUIET), tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state["callbacks"]["History"]["rows"][0]["seconds"] = 1000.0
    torch.save(state, tmp_path / "last.ckpt")
    seconds = fit(adapted_task(), splits(), TrainingSettings(epochs=2, **QUIET), tmp_path, resume=True)["seconds"]
    assert 1000 < seconds["training"] < seconds["total"]


# ------------------------------------------------------------------ what a killed process leaves
def test_the_next_start_removes_what_a_kill_has_left(tmp_path):
    settings = TrainingSettings(epochs=1, **QUIET)
    (tmp_path / ".config.yaml.abc.tmp").touch()
    fit(adapted_task(), splits(), settings, tmp_path)  # a folder with nothing else is not refused
    left = [tmp_path / ".results.json.abc.tmp", tmp_path / "last.ckpt"]  # killed before the checkpoint was removed
    mine = tmp_path / ".notes"
    for file in [*left, mine]:
        file.write_text("x")
    with atomic_path(tmp_path / "table.md") as written:
        fit(adapted_task(), splits(), settings, tmp_path, resume=True)
        assert not any(file.exists() for file in left)
        assert mine.exists()
        assert written.exists(), "a file that another process is writing is no leftover"


def test_checkpoints_are_written_in_their_folder_under_a_name_that_is_held(tmp_path, monkeypatch):
    """No other file is made, which a kill would leave where nobody looks for it."""
    renamed, replace = [], os.replace

    def replace_what_is_held(source, target):
        remove_leftovers(Path(source).parent)
        renamed.append((Path(source).parent, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_what_is_held)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    fit(adapted_task(), splits(), TrainingSettings(epochs=1, **QUIET), tmp_path / "run")
    assert {folder for folder, _ in renamed} == {tmp_path / "run"}
    assert {"last.ckpt", "adapter_model.safetensors"} <= {name for _, name in renamed}


def test_deterministic_algorithms_while_training_and_not_after():
    for asked in (True, False):
        task, seen = adapted_task(), []
        task.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.are_deterministic_algorithms_enabled()))
        fit(task, splits(), TrainingSettings(epochs=1, deterministic=asked, **QUIET))
        assert set(seen) == {asked}
        assert not torch.are_deterministic_algorithms_enabled()
