"""kill -9 in the middle of train, tune and compare: nothing is corrupt, and the command given again ends as if
nothing had happened, bit for bit."""

import random
from pathlib import Path

import kills
import pytest
from kills import Command, Nth, check_whole, outcome, run_for, run_until_change
from picture_folders import write_splits, write_tiny_backbone

from deltalens.lifecycle.atomic import is_leftover


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_splits(folder / "photos", train=8, val=4, test=4)
    write_tiny_backbone(folder / "model")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place):
    """name of a command -> what a run that is left alone leaves."""
    found = {}

    def of(command: Command) -> dict:
        if command.name not in found:
            folder = place / f"undisturbed-{command.name}"
            folder.mkdir()
            code = run_until_change(command.start(folder), folder, Nth(0), place / "log.txt")
            assert code == 0, (place / "log.txt").read_text()
            check_whole(folder)
            found[command.name] = outcome(folder)
        return found[command.name]

    return of


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if is_leftover(path)]


def killed_at(command: Command, folder: Path, changes: list[Nth]) -> None:
    """Kill the command at each of these changes in turn, then let it through."""
    log = folder.with_suffix(".log")
    words = command.start(folder)
    for change in changes:
        assert run_until_change(words, folder, change, log) == -9, f"no {change}\n{log.read_text()}"
        check_whole(folder)
        words = command.again(folder)
    assert run_until_change(words, folder, Nth(0), log) == 0, log.read_text()


def test_train_killed_while_writing(place, undisturbed, tmp_path):
    """When the first checkpoint is written and not renamed, and when only the last one is to be removed."""
    command = kills.commands(place)["train"]
    killed_at(command, tmp_path / "run", [Nth(1, "replace last.ckpt"), Nth(1, "unlink last.ckpt")])
    assert outcome(tmp_path / "run") == undisturbed(command)


def test_tune_killed_while_writing(place, undisturbed, tmp_path):
    """When a trial is trained and not told, and when adapters that are not the best one's go."""
    command = kills.commands(place)["tune"]
    killed_at(command, tmp_path / "run", [Nth(1, "unlink last.ckpt"), Nth(1, "unlink adapter_config.json")])
    expected = undisturbed(command)
    assert outcome(tmp_path / "run") == expected
    assert {state for _, state, *_ in expected["out/search.db"]} == {"COMPLETE", "PRUNED"}


# ------------------------------------------------------------------ long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "kept", "tune", "compare"])
def test_killed_before_every_change(name, place, undisturbed, tmp_path):
    """Every rename and every removal there is, each in a run of its own."""
    command = kills.commands(place)[name]
    expected = undisturbed(command)
    for number in range(1, 1000):
        folder = tmp_path / f"{number:03d}"
        if run_until_change(command.start(folder), folder, Nth(number), tmp_path / "log.txt") != -9:
            break
        check_whole(folder)
        assert run_until_change(command.again(folder), folder, Nth(0), tmp_path / "log.txt") == 0
        assert outcome(folder) == expected, f"killed at change {number}"
    assert number > 10


SEED = 20261121


@pytest.fixture(scope="module")
def seconds(place, undisturbed):
    """name of a command -> how long it takes, with the start of python."""
    found = {}

    def of(command: Command) -> float:
        if command.name not in found:
            folder, log = place / f"real-{command.name}", place / "real.txt"
            code, found[command.name] = run_for(command.start(folder), None, log)
            assert code == 0, log.read_text()
            assert outcome(folder) == undisturbed(command)
        return found[command.name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(20))
def test_killed_at_a_random_moment(kill, place, undisturbed, seconds, tmp_path):
    """Real commands, killed up to three times each after a time between nothing and a whole run."""
    draw = random.Random(SEED + kill)
    command = list(kills.commands(place).values())[kill % 4]
    expected = undisturbed(command)
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    words, delays = command.start(folder), []
    for _ in range(draw.randint(1, 3)):
        delays.append(draw.uniform(0, 1.05 * seconds(command)))
        code, _ = run_for(words, delays[-1], log)
        print(
            f"seed {SEED + kill}: {command.name} after {delays[-1]:.2f} of {seconds(command):.2f} s: {code}, "
            f"left {leftovers(folder)}"
        )
        check_whole(folder)
        words = command.again(folder)
    assert run_for(words, None, log)[0] == 0, log.read_text()
    assert outcome(folder) == expected, delays
