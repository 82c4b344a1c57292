"""Workers of a study as processes and as tasks of Ray: who ended, and that nobody is left behind."""

import builtins
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import light_jobs
import pytest
import torch
from light_jobs import LightJob, alive, pids, wait_until

from deltalens.studies import local_crew
from deltalens.studies.local_crew import LocalCrew, visible_gpus
from deltalens.studies.ray_crew import cpus_each, gpus_each, import_ray


@pytest.fixture(autouse=True)
def _nothing_heavy(monkeypatch):
    monkeypatch.setattr(local_crew, "IMPORTED", [])


@pytest.fixture(autouse=True)
def _interrupts_arrive():
    """A shell's background jobs, and all that they start, ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def all_ended(crew, count) -> dict:
    found = {}
    wait_until(lambda: found.update(crew.ended(1)) or len(found) == count)
    return found


def test_a_crew_says_who_ended_and_how(tmp_path, capfd):
    with LocalCrew(LightJob(tmp_path)) as crew:
        crew.context = multiprocessing.get_context("spawn")  # a server of earlier tests has their stderr
        for place, worker in enumerate(("end", "raise", "die")):
            crew.start(worker, place)
        assert all_ended(crew, 3) == {"end": None, "raise": "exit code 1", "die": "killed by SIGKILL"}
    assert "OSError: no space left" in capfd.readouterr().err


def test_a_killed_worker_leaves_nothing_that_it_has_started(tmp_path):
    with LocalCrew(LightJob(tmp_path)) as crew:
        crew.start("sleep", 0)
        own, started = pids(tmp_path, "sleep")
        os.kill(own, signal.SIGKILL)
        assert all_ended(crew, 1) == {"sleep": "killed by SIGKILL"}
        wait_until(lambda: not alive(started), 5)


def test_the_end_of_a_crew_is_the_end_of_its_workers(tmp_path):
    with LocalCrew(LightJob(tmp_path)) as crew:
        crew.start("sleep-0", 0)
        crew.start("sleep-1", 1)
        there = pids(tmp_path, "sleep-0", "sleep-1")
        assert all(map(alive, there))
    wait_until(lambda: not any(map(alive, there)), 5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_the_main_process(how, tmp_path):
    """SIGINT goes to the whole group, as Ctrl-C in a terminal does; the others to the main process alone."""
    main = subprocess.Popen(
        [sys.executable, light_jobs.__file__, str(tmp_path)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    there = pids(tmp_path, "sleep-0", "sleep-1")
    assert len(set(there)) == 4
    assert all(map(alive, there))
    if how == signal.SIGINT:
        os.killpg(main.pid, how)
    else:
        main.send_signal(how)
    printed = main.communicate(timeout=20)[1]
    wait_until(lambda: not any(map(alive, there)), 10)
    assert printed.count("Traceback") == (1 if how == signal.SIGINT else 0)  # the main process' own


def test_an_interrupt_while_a_worker_starts_ends_it(tmp_path, monkeypatch):
    crew = LocalCrew(LightJob(tmp_path))
    kind, started = crew.context.Process, []

    def interrupted(process, start=kind.start):
        start(process)
        started.append(process)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    monkeypatch.setattr(kind, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), crew:
        crew.start("sleep-0", 0)
    assert [process.exitcode for process in started] == [-signal.SIGKILL]


def test_workers_are_dealt_over_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    with LocalCrew(LightJob(tmp_path), visible_gpus()) as crew:
        for place in range(3):
            crew.start(f"end-{place}", place)
        assert set(all_ended(crew, 3).values()) == {None}
    assert [(tmp_path / f"end-{place}").read_text() for place in range(3)] == ["5", "7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_gpus() == []


# ------------------------------------------------------------------ Ray
@pytest.mark.slow  # Ray takes ten seconds to start, and gives up after thirty where the processor is busy
def test_a_crew_of_ray_says_who_ended_and_how(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from deltalens.studies.ray_crew import RayCrew

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the tests' own modules
    with RayCrew(LightJob(Path(".")), 4, "local") as crew:
        for place, worker in enumerate(("end", "raise", "die", "sleep")):
            crew.start(worker, place)
        found = all_ended(crew, 3)
        assert found.pop("end") is None
        assert found.pop("raise") == "OSError: no space left"
        assert "died" in found.pop("die")
        own = pids(tmp_path, "sleep")[0]
        assert alive(own)
    wait_until(lambda: not alive(own), 10)
    assert (tmp_path / "end").is_file()  # the folder they are told is the one the command was given in


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from deltalens.studies.ray_crew import RayCrew

    with pytest.raises(ConnectionError, match=r"no cluster for --ray 127.0.0.1:1: .*ray start --head"):
        RayCrew(LightJob(tmp_path), 1, "127.0.0.1:1").__enter__()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(ConnectionError, match=r"no cluster for --ray 127.0.0.1:2: "):
        RayCrew(LightJob(tmp_path), 1, "auto").__enter__()


def test_without_ray_there_is_one_line(monkeypatch):
    real = builtins.__import__

    def no_ray(name, *rest):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    with pytest.raises(ValueError, match=r'not installed: pip install "deltalens\[ray\]"'):
        import_ray()


def test_shares_of_a_cluster():
    assert cpus_each([16], 4) == 4
    assert cpus_each([4, 12], 2) == 6  # two on the large machine
    assert cpus_each([8, 8], 3) == 4
    assert cpus_each([2], 5) == 1
    assert gpus_each(0, 3) == 0
    assert gpus_each(4, 2) == 1
    assert gpus_each(2, 3) == 0.5
