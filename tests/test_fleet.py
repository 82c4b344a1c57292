"""Several processes at one study: every run is done once, as one process would do it, whoever is killed meanwhile."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import pytest
from light_jobs import wait_until
from study_fixtures import STUDY, compare, grid_of, results_of, write_study

from deltalens.cli.sized_backbone import create_sized_backbone
from deltalens.studies import attempts, carry_out
from deltalens.studies.attempts import Worker
from deltalens.studies.fleet import Job, run_study
from deltalens.studies.local_crew import LocalCrew
from deltalens.studies.locks import RunLocks
from deltalens.studies.progress import Progress
from deltalens.training.callbacks import KeepLast

CELL = "tiny/photos/LoRA-+-biases"


@dataclass(frozen=True)
class WatchedJob(Job):
    """A job that notes every training it begins, as PID FOLDER, and whose workers kill themselves after the first epoch
    of the runs in `deadly`, so many times."""

    notes: Path = Path()
    deadly: tuple[tuple[str, int], ...] = ()

    def workplace(self):
        place = super().workplace()
        train = place.train

        save = KeepLast._save

        def noted(run, *rest, **options):
            name = f"{run.folder.parent.name}/{run.folder.name}"
            with open(self.notes, "a") as file:
                file.write(f"{os.getpid()} {name}\n")
            dies = Counter(done for _, done in self.trainings())[name] <= dict(self.deadly).get(name, 0)

            def save_and_die(keeper, trainer):
                save(keeper, trainer)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

            KeepLast._save = save_and_die
            return train(run, *rest, **options)

        place.train = noted
        return place

    def trainings(self) -> list[tuple[str, str]]:
        return [tuple(line.split()) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []


def job_of(place, file, output, **options) -> WatchedJob:
    study = grid_of(place, file, output).study
    return WatchedJob(study, output, create_sized_backbone, threads=1, loader_workers=0, **options)


def outcomes(output: Path) -> dict:
    """All of every result that is not a time, and the tensors."""
    found = {}
    for name, results in results_of(output).items():
        history = [{key: value for key, value in row.items() if key != "seconds"} for row in results["history"]]
        kept = {key: results[key] for key in ("val", "test", "parameters", "data", "settings")}
        tensors = output / "runs" / name / "adapter_model.safetensors"
        found[name] = (kept, history, tensors.read_bytes() if tensors.is_file() else None, results.get("trained_in"))
    return found


# ------------------------------------------------------------------ workers
def test_workers_leave_what_one_process_leaves(finished, place, tmp_path):
    job, lines = job_of(place, finished[0], tmp_path / "out", notes=tmp_path / "notes"), []
    run_study(job, LocalCrew(job), 3, show=lines.append)
    assert outcomes(tmp_path / "out") == outcomes(finished[1])
    done = Counter(folder for _, folder in job.trainings())
    assert len(done) == 6
    assert set(done.values()) == {1}
    assert len({pid for pid, _ in job.trainings()}) > 1
    assert sorted(line[: len("[1/8]")] for line in lines) == [f"[{number}/8]" for number in range(1, 9)]
    assert lines[-1].count("left") == 0
    assert list(tmp_path.rglob("attempt.json")) == []


def test_a_worker_that_is_killed_and_a_run_that_kills(finished, place, tmp_path):
    """What a killed worker was at is done by another, from its checkpoint; what kills two is given up."""
    once, always = "Linear/seed-1", "LoRA-+-biases/seed-1"
    job = job_of(
        place, finished[0], tmp_path / "out", notes=tmp_path / "notes", deadly=((once, 1), (always, 9))
    )  # fmt: skip
    lines = []
    run_study(job, LocalCrew(job), 2, show=lines.append)
    shown = "\n".join(lines)
    assert shown.count("a worker died (killed by SIGKILL)") == 3
    assert "[8/8] tiny, photos, LoRA + biases, seed 1: failed: it killed the process that trained it 2 times" in shown
    failed = {run.folder.name: run.failure() for run in job.grid().runs() if run.failure() is not None}
    assert list(failed) == ["seed-1"]
    assert outcomes(tmp_path / "out") == {n: o for n, o in outcomes(finished[1]).items() if n != f"{CELL}/seed-1"}
    trainings = Counter(folder for _, folder in job.trainings())
    assert (trainings[once], trainings[always]) == (2, 2)
    assert list(tmp_path.rglob("attempt.json")) == []


def begin_together(barrier, job):
    barrier.wait(60)
    run_study(job)


def test_two_commands_share_one_folder(finished, place, tmp_path):
    job = job_of(place, finished[0], tmp_path / "out", only=("Linear",), notes=tmp_path / "notes")
    context = LocalCrew(job).context
    barrier = context.Barrier(2)
    commands = [context.Process(target=begin_together, args=(barrier, job)) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert [command.exitcode for command in commands] == [0, 0]
    assert outcomes(tmp_path / "out") == {name: o for name, o in outcomes(finished[1]).items() if "Linear" in name}
    assert set(Counter(folder for _, folder in job.trainings()).values()) == {1}


class StillbornCrew:
    """Workers that end before they begin."""

    def __init__(self):
        self.started = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, worker, place):
        self.started.append(worker)

    def ended(self, seconds):
        return {self.started[-1]: "exit code 1"}


def test_workers_that_never_begin_end_the_study(finished, place, tmp_path):
    crew, job = StillbornCrew(), job_of(place, finished[0], tmp_path / "out", notes=tmp_path / "notes")
    with pytest.raises(RuntimeError, match="workers die before they begin a run, the last one exit code 1"):
        run_study(job, crew, 1, show=lambda line: None)
    assert len(crew.started) == 2


def test_ranks_are_refused_and_workers_are_none(finished, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert compare(place, finished[0], tmp_path / "out") == 1
    assert "one of several ranks" in capsys.readouterr().err
    job = job_of(place, finished[0], tmp_path / "out", only=("Linear", "lr-0.03"), notes=tmp_path / "notes")
    with monkeypatch.context() as environment:
        environment.setattr(os, "environ", dict(os.environ, RANK="1"))
        job.carry_out(Worker("a", "a-1"))  # as on the second machine of a job that has started Ray
    assert results_of(tmp_path / "out").keys() == {"tiny/photos/Linear/lr-0.03"}


# ------------------------------------------------------------------ locks
def first_run(place, file, output):
    return next(grid_of(place, file, output).runs())


def test_a_lock_is_held_once_and_gone_with_its_process(finished, place, tmp_path):
    run, locks = first_run(place, finished[0], tmp_path / "out"), RunLocks(tmp_path / "out")
    assert not locks.held_elsewhere(run)
    assert not locks.locks.exists()  # a look leaves nothing
    with locks.hold(run) as first, locks.hold(run) as second:
        assert (first, second) == (True, False)
        assert locks.held_elsewhere(run)
    assert not locks.held_elsewhere(run)
    assert not run.folder.exists()

    holder = multiprocessing.get_context("fork").Process(target=hold_for_ever, args=(locks, run))
    holder.start()
    wait_until(lambda: locks.held_elsewhere(run))
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not locks.held_elsewhere(run)


def hold_for_ever(locks, run):
    with locks.hold(run):
        time.sleep(600)


def test_a_disk_without_locks_is_said(finished, place, tmp_path, monkeypatch):
    import fcntl

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    run, locks = first_run(place, finished[0], tmp_path / "out"), RunLocks(tmp_path / "out")
    with (
        pytest.warns(UserWarning, match="flock"),
        pytest.raises(OSError, match="name an --output on a disk with file locks"),
        locks.hold(run),
    ):
        pass


def test_runs_in_work_elsewhere_are_left_alone(finished, place, tmp_path, capsys, monkeypatch):
    """--dry-run says so, --only-table and --retry-failed work meanwhile, and the command waits for its turn."""
    file, output = finished[0], tmp_path / "out"
    runs = list(grid_of(place, file, output).runs())
    lock = filelock.FileLock(output / "locks/tiny/photos/Linear/lr-0.003.lock")
    lock.lock_file and Path(lock.lock_file).parent.mkdir(parents=True)
    monkeypatch.setattr(carry_out, "WAIT", 0.05)
    with lock:
        assert compare(place, file, output, "--dry-run") == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].endswith("search lr 0.003 (in work)")
        assert printed[-1] == "8 runs: 0 finished, 0 failed, 8 open"
        assert compare(place, file, output, "--only-table") == 0
        runs[0].note_failure(RuntimeError("just now"))
        carry_out.reopen(grid_of(place, file, output), runs)
        assert runs[0].failure() == "just now"
        runs[0].forget_failure()
        command = threading.Thread(target=compare, args=(place, file, output, "--only", "Linear"))
        command.start()
        wait_until(lambda: results_of(output).keys() == {"tiny/photos/Linear/lr-0.03"})
        time.sleep(0.3)
        assert results_of(output).keys() == {"tiny/photos/Linear/lr-0.03"}  # final runs need both searches
    command.join()
    assert outcomes(output) == {name: o for name, o in outcomes(finished[1]).items() if "Linear" in name}
    assert "other processes do the last 3 runs; waiting" in capsys.readouterr().out


def test_a_removed_folder_is_trained_again(finished, place, tmp_path):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(finished[1], output)
    shutil.rmtree(output / "runs" / CELL / "seed-1")
    assert compare(place, finished[0], output, "--parallel", "1") == 0
    assert outcomes(output) == outcomes(finished[1])


# ------------------------------------------------------------------ deaths
def test_only_deaths_in_the_same_session_count(finished, place, tmp_path):
    run = first_run(place, finished[0], tmp_path / "out")
    first, fellow, later = Worker("a", "a-1"), Worker("a", "a-2"), Worker("b", "b-1")
    assert attempts.begin(run, first) is None
    assert attempts.begun_by(run, first)
    assert not attempts.begun_by(run, fellow)
    assert attempts.begin(run, fellow) is None  # one death
    assert attempts.begin(run, later) is None  # the session was ended, by whom nobody knows
    assert attempts.begin(run, None) is None
    assert attempts.begin(run, later) is None
    assert "2 times" in attempts.begin(run, later)
    assert not (run.folder / attempts.ATTEMPT).exists()
    assert attempts.begin(run, None) is None
    assert not (run.folder / attempts.ATTEMPT).exists()  # a process that is alone leaves no note


def test_searches_keep_their_adapters_for_the_run_that_takes_one_over(finished, place, tmp_path):
    """The second seed may be finished before the first."""
    job = job_of(place, finished[0], tmp_path / "out", only=("Linear", "seed-1"), notes=tmp_path / "notes")
    run_study(job, show=lambda line: None)
    cell = tmp_path / "out/runs/tiny/photos/Linear"
    assert {path.parent.name for path in cell.rglob("adapter_model.safetensors")} == {"lr-0.003", "lr-0.03", "seed-1"}
    run_study(replace(job, only=("Linear",)), show=lambda line: None)
    assert outcomes(tmp_path / "out") == {name: o for name, o in outcomes(finished[1]).items() if "Linear" in name}


# ------------------------------------------------------------------ some runs only; how long the rest takes
def test_words_choose_runs(finished, place, tmp_path, capsys):
    def listed(*words):
        assert compare(place, finished[0], tmp_path / "out", "--dry-run", *words) == 0
        return [line.removeprefix("tiny, photos, ") for line in capsys.readouterr().out.splitlines()[:-1]]

    assert listed("--only", "linear") == [
        "Linear, search lr 0.003",
        "Linear, search lr 0.03",
        "Linear, seed 0",
        "Linear, seed 1",
    ]
    assert len(listed("--only", "linear", "--only", "LoRA*")) == len(listed()) == 8
    assert listed("--only=seed 1", "--only", "linear") == [
        "Linear, search lr 0.003",  # final runs need them
        "Linear, search lr 0.03",
        "Linear, seed 1",
    ]
    assert listed("--only", "lr-0.03") == ["Linear, search lr 0.03"]
    for words, message in (
        (
            ["Mona"],
            "--only 'Mona' matches nothing; there is method Linear, LoRA + biases; dataset photos; backbone tiny",
        ),
        (["Linear", "lr-0.005"], "no run matches all of --only Linear, lr-0.005; there is method"),
    ):
        only = [option for word in words for option in ("--only", word)]
        assert compare(place, finished[0], tmp_path / "out", *only) == 1
        assert message in capsys.readouterr().err
    assert compare(place, finished[0], tmp_path / "out", "--only", "Linear", "--only-table") == 1


def test_a_failed_run_alone_is_tried_again(finished, place, tmp_path):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(finished[1], output)
    grid = grid_of(place, finished[0], output)
    runs = {f"{run.folder.parent.name}/{run.folder.name}": run for run in grid.runs()}
    for name in ("Linear/seed-1", "LoRA-+-biases/seed-1"):
        shutil.rmtree(runs[name].folder)
        runs[name].note_failure(RuntimeError("it rained"), grid.chosen(runs[name].cell))
    assert compare(place, finished[0], output, "--only", "Linear", "--retry-failed") == 0
    assert runs["Linear/seed-1"].output.finished
    assert runs["LoRA-+-biases/seed-1"].failure() == "it rained"


def test_the_time_left_is_that_of_all_workers(finished, place, tmp_path, capsys):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(finished[1], output)
    for file in output.rglob("results.json"):
        results = json.loads(file.read_text())
        file.write_text(json.dumps(results | {"seconds": {"total": 300.0, "training": 299.0}}))
    for name in ("Linear/seed-1", "LoRA-+-biases/seed-1"):
        shutil.rmtree(output / "runs/tiny/photos" / name)
    grid = grid_of(place, finished[0], output)
    runs = list(grid.runs())
    assert [Progress(grid, runs, workers).left() for workers in (1, 2, 3)] == [600, 300, 300]
    assert compare(place, finished[0], output, "--dry-run", "--parallel", "2") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["8 runs: 6 finished, 0 failed, 2 open", "about 5 min left"]
    empty = grid_of(place, finished[0], tmp_path / "empty")
    assert Progress(empty, list(empty.runs())).left() is None


# ------------------------------------------------------------------ the command itself
def command(place, file, output, *words):
    import subprocess
    import sys

    source = [sys.executable, "-m", "deltalens.cli.main", "compare", str(file), "--output", str(output)]
    return subprocess.Popen(
        [*source, "--data", f"photos={place / 'photos'}", "--threads", "1", "--workers", "0", *words],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--parallel", "2"), ("--parallel", "2", "--ray", "local")])
def test_the_command_with_workers_leaves_what_one_leaves(words, finished, place, tmp_path):
    if "--ray" in words:
        pytest.importorskip("ray")
    printed, errors = command(place, finished[0], tmp_path / "out", *words).communicate(timeout=900)
    assert "[8/8]" in printed, errors
    assert outcomes(tmp_path / "out") == outcomes(finished[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [(signal.SIGKILL, ()), (signal.SIGINT, ()), (signal.SIGKILL, ("--ray", "local"))],
)
def test_a_stopped_parallel_command_goes_on(how, words, finished, place, tmp_path):
    """After the end of the main process nobody holds a lock, and the same command goes on."""
    if "--ray" in words:
        pytest.importorskip("ray")
    text = STUDY.replace("epochs: 2", "epochs: 400")
    file = write_study(place, tmp_path, text)
    main = command(place, file, tmp_path / "out", "--parallel", "2", *words)
    wait_until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2, 600)
    grid, locks = grid_of(place, file, tmp_path / "out"), RunLocks(tmp_path / "out")
    assert sum(locks.held_elsewhere(run) for run in grid.runs()) == 2
    os.killpg(main.pid, how) if how == signal.SIGINT else main.send_signal(how)
    errors = main.communicate(timeout=60)[1]
    wait_until(lambda: not any(locks.held_elsewhere(run) for run in grid.runs()), 20)
    if how == signal.SIGINT:
        assert errors.strip().endswith("deltalens: error: the study was stopped; the same command goes on")
        assert main.returncode == 130
    assert all(run.failure() is None for run in grid.runs())
