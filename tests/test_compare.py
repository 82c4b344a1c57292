"""`deltalens compare`: what is run, what is chosen on which images, what survives a kill, and what the table says."""

import csv
import re
import statistics
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from study_fixtures import STUDY, compare, grid_of, results_of, write_study

import deltalens as dl
from deltalens.studies import trial
from deltalens.studies.examples import Examples, picture_file, shown_indices
from deltalens.studies.study_table import read_table
from deltalens.training import callbacks, fit


# ------------------------------------------------------------------ a whole study
def test_every_run_is_there(finished):
    cells = ("tiny/photos/Linear", "tiny/photos/LoRA-+-biases")
    rates = {cells[0]: ("0.003", "0.03"), cells[1]: ("0.0005", "0.005")}
    expected = {f"{cell}/lr-{rate}" for cell in cells for rate in rates[cell]}
    expected |= {f"{cell}/seed-{seed}" for cell in cells for seed in (0, 1)}
    assert set(results_of(finished[1])) == expected


def test_searches_see_no_test_image_and_final_runs_see_them_once(finished):
    for name, results in results_of(finished[1]).items():
        assert bool(results["test"]) == ("/seed-" in name), name
        assert results["data"]["test"] == (18 if "/seed-" in name else 0)
        assert (results["data"]["train"], results["data"]["val"]) == (24, 12)


def test_the_rate_is_the_best_on_validation(finished):
    results = results_of(finished[1])
    for cell in {name.rpartition("/")[0] for name in results}:
        searches = [r for name, r in results.items() if name.startswith(f"{cell}/lr-")]
        best = max(searches, key=lambda r: (r["val"]["accuracy"], -r["settings"]["lr"]))["settings"]["lr"]
        finals = [r for name, r in results.items() if name.startswith(f"{cell}/seed-")]
        assert [final["settings"]["lr"] for final in finals] == [best] * 2


def test_the_first_final_run_equals_one_trained_anew(finished, place):
    """Its training is taken over from the search; only the test was left."""
    for cell, methods in (("Linear", [dl.LinearConfig()]), ("LoRA-+-biases", [dl.LoRAConfig(r=2), dl.BitFitConfig()])):
        results = results_of(finished[1])[f"tiny/photos/{cell}/seed-0"]
        assert results["trained_in"] == f"lr-{results['settings']['lr']:g}"
        file, output = finished
        grid = grid_of(place, file, output)
        run = next(run for run in grid.runs() if run.folder == output / "runs/tiny/photos" / cell / "seed-0")
        from deltalens.cli.sized_backbone import create_sized_backbone

        workplace = trial.Workplace(grid.study, create_sized_backbone)
        model, preprocessing = workplace._model(run, ["a", "b", "c"])
        dl.attach(model, methods)
        values = results["values"]
        task, data = workplace._task(run, model, preprocessing, values)
        anew = fit(task, data, workplace._settings(run, values))
        assert anew["test"] == results["test"]
        assert anew["val"] == results["val"]
        saved = dl.from_pretrained(run.folder)
        assert dl.adapter_info(saved)["metrics"]["test accuracy"] == results["test"]["accuracy"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved.state_dict()[name]), name


def test_the_table_holds_the_numbers_of_the_runs(finished, place):
    file, output = finished
    results = results_of(output)
    rows = {row["folder"].removeprefix("runs/"): row for row in csv.DictReader((output / "runs.csv").open())}
    assert rows.keys() == results.keys()
    for name, row in rows.items():
        assert float(row["val_accuracy"]) == results[name]["val"]["accuracy"]
        assert row["test_accuracy"] == (str(results[name]["test"]["accuracy"]) if "/seed-" in name else "")
        assert int(row["adapter_parameters"]) == results[name]["parameters"]["adapter"]
        assert float(row["lr"]) == results[name]["settings"]["lr"]
    cells = {cell.variant.label: cell for cell in read_table(grid_of(place, file, output)).cells}
    markdown = (output / "table.md").read_text()
    for label, folder in (("Linear", "Linear"), ("LoRA + biases", "LoRA-+-biases")):
        found = [results[f"tiny/photos/{folder}/seed-{seed}"] for seed in (0, 1)]
        accuracies = [each["test"]["accuracy"] for each in found]
        mean, std = statistics.fmean(accuracies), abs(accuracies[0] - accuracies[1]) / 2**0.5
        assert cells[label].mean == pytest.approx(mean)
        assert cells[label].std == pytest.approx(std)
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
        columns = [column.strip() for column in line.strip("|").split("|")]
        adapter, head = (found[0]["parameters"][key] for key in ("adapter", "head"))
        assert columns[1] == f"{100 * mean:.1f} ± {100 * std:.1f}"
        assert columns[2:4] == [f"{adapter:,}", f"{adapter + head:,}"]
        assert columns[5] == f"{found[0]['settings']['lr']:g} *"  # of two candidates each is at an edge
    assert cells["LoRA + biases"].adapter_parameters == 3 * 2 * 2 * (24 + 24) + bias_count(place)


def test_results_say_where_and_when_and_the_report_repeats_it(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    for name, results in results_of(finished[1]).items():
        assert "CPU cores" in results["machine"]
        assert datetime.fromisoformat(results["finished"]).utcoffset() == timedelta(0)
        assert results["peak_memory_bytes"] is None or results["device"].startswith("cuda")
        assert f'href="runs/{name}/"' in page
        assert results["machine"] in page
        assert results["finished"][:10] in page


def bias_count(place) -> int:
    model = dl.create_backbone(str(place / "model"))
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") and "head" not in name)


def test_nothing_is_done_twice(finished, place, monkeypatch, capsys):
    file, output = finished
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    monkeypatch.setattr(trial, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(trial, "_tested", lambda *_: pytest.fail("tested again"))
    assert compare(place, file, output) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == before
    capsys.readouterr()
    assert compare(place, file, output, "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "8 runs: 8 finished, 0 failed, 0 open"
    assert len(printed) == 9


def test_adapters_are_kept_or_dropped(finished, place, tmp_path):
    kept = {path.parent.name for path in finished[1].rglob("adapter_model.safetensors")}
    assert kept == {"seed-0", "seed-1"}
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0, 1]\nkeep_adapters: false")
    file = write_study(place, tmp_path, text)
    assert compare(place, file, tmp_path / "out") == 0
    assert list(tmp_path.rglob("adapter_*")) == []
    assert scores(tmp_path / "out") == scores(finished[1])


def scores(output: Path) -> dict[str, tuple]:
    return {name: (r["val"], r["test"], r["settings"]["lr"]) for name, r in results_of(output).items()}


def test_a_method_added_later_and_the_table_alone(finished, place, tmp_path):
    import shutil

    output = tmp_path / "out"
    shutil.copytree(finished[1], output)
    file = write_study(place, tmp_path, STUDY.replace("seeds", "  BitFit: bitfit\nseeds"))
    assert compare(place, file, output, "--only-table") == 0
    line = next(line for line in (output / "table.md").read_text().splitlines() if line.startswith("| BitFit"))
    assert line.split("|")[2].strip() == "-"
    assert compare(place, file, output) == 0
    assert len(results_of(output)) == 12
    assert {name: s for name, s in scores(output).items() if "BitFit" not in name} == scores(finished[1])


# ------------------------------------------------------------------ example pictures
def test_final_runs_keep_what_their_adapter_says(finished, place):
    found = results_of(finished[1])
    assert {name for name, results in found.items() if "examples" in results} == {n for n in found if "/seed-" in n}
    files = sorted((place / "photos/test").rglob("*.*g"), key=lambda file: (file.parent.name, file.name))
    for name in ("tiny/photos/LoRA-+-biases/seed-0", "tiny/photos/LoRA-+-biases/seed-1", "tiny/photos/Linear/seed-1"):
        examples = Examples.from_dict(found[name]["examples"])
        assert (examples.part, examples.images) == ("test", len(files))
        assert [e.index for e in examples.shown] == shown_indices(18)
        model = dl.from_pretrained(finished[1] / "runs" / name).eval()
        transform = dl.data.eval_transform(dl.preprocessing(model))
        for example in examples.shown:
            file = files[example.index]
            assert example.true == (file.parent.name,)
            with torch.no_grad():
                sure = torch.softmax(model(transform(Image.open(file).convert("RGB"))[None]), 1)[0]
            assert example.said == ((dl.class_names(model)[int(sure.argmax())], pytest.approx(float(sure.max()))),)
            kept = np.asarray(Image.open(picture_file(finished[1], "photos", example.index)), float)
            assert kept.mean((0, 1)) == pytest.approx(np.asarray(Image.open(file), float).mean((0, 1)), abs=6)


def test_the_report_shows_them(finished):
    output = finished[1]
    html = (output / "report.html").read_text(encoding="utf-8")
    (part,) = (each for each in html.split("<section>") if "<h2>Example pictures: tiny, photos</h2>" in each)
    assert "6 of 18 test samples" in part
    cards = re.findall(r'<article class="picture"><img src="data:image/jpeg;base64,[^"]+".*?</article>', part)
    assert len(cards) == 6
    found = results_of(output)
    for number, card in enumerate(cards):
        for label, folder in (("Linear", "Linear"), ("LoRA + biases", "LoRA-+-biases")):
            own = Examples.from_dict(found[f"tiny/photos/{folder}/seed-0"]["examples"]).shown[number]
            assert f"<h3>{own.true[0]}</h3>" in card
            mark, (name, sure) = "✓" if own.right else "✗", own.said[0]
            assert (
                f'{mark}</span><span class="by">{label}</span><b>{name}</b><span class="sure">{100 * sure:.0f} %<'
                in card
            )
    assert not re.search(r"https?:|url\(|@import|<script|\ssrc=\"(?!data:)", html)


# ------------------------------------------------------------------ kills, failures, changes
@pytest.mark.parametrize("epochs_before_the_kill", [1, 4, 11])
def test_a_stopped_study_goes_on_as_if_it_had_not_been(epochs_before_the_kill, finished, place, tmp_path, monkeypatch):
    file, saves, save = write_study(place, tmp_path), [], callbacks.KeepLast._save

    def save_or_stop(self, trainer):
        save(self, trainer)
        saves.append(1)
        if len(saves) == epochs_before_the_kill:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks.KeepLast, "_save", save_or_stop)
    assert compare(place, file, tmp_path / "out") == 130
    assert scores(tmp_path / "out").keys() < scores(finished[1]).keys()
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1
    assert compare(place, file, tmp_path / "out") == 0
    assert len(saves) == 12  # six runs are trained, two epochs each, none of them twice
    assert scores(tmp_path / "out") == scores(finished[1])


def test_a_failed_run_is_shown_and_tried_again_only_when_asked(place, tmp_path, capsys, monkeypatch):
    text = STUDY.replace(
        "  Linear: linear", "  Linear: {method: linear, lr: 1.0e+30}\n  Mona: {method: mona, lr: 1e30}"
    )
    text = text.replace("[1, 0.1]", "[1, 1e-32]")
    file, output = write_study(place, tmp_path, text), tmp_path / "out"
    assert compare(place, file, output) == 0
    printed = capsys.readouterr().out
    state = {run.folder.name: grid_of(place, file, output).state(run) for run in grid_of(place, file, output).runs()
             if run.variant.label == "Mona"}  # fmt: skip
    assert state == {"lr-1e+30": "failed", "lr-0.01": "finished", "seed-0": "finished", "seed-1": "finished"}
    assert "search lr 1e+30: failed: " in printed
    table = (output / "table.md").read_text()
    assert "- Mona, lr 1e+30: the" in table
    trained = []
    monkeypatch.setattr(trial, "fit", lambda *args, **kwargs: trained.append(args[3]) or fit(*args, **kwargs))
    assert compare(place, file, output) == 0
    assert trained == []
    assert compare(place, file, output, "--retry-failed") == 0
    assert {folder.name for folder in trained} == {"lr-1e+30"}


def test_a_method_that_does_not_fit_fails_alone(place, tmp_path, capsys):
    """Every candidate fails, so there is no rate for the final runs, which say so."""
    text = STUDY.replace("  Linear: linear", "  Wrong: {method: lora, target_modules: nothing}\n  Linear: linear")
    file, output = write_study(place, tmp_path, text), tmp_path / "out"
    assert compare(place, file, output) == 0
    table = (output / "table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| Wrong"))
    assert line.split("|")[2].strip() == "failed"
    assert "seed 1: every trial of the search failed: target_modules='nothing' matches no layer" in table
    assert len(results_of(output)) == 8
    rows = [row for row in csv.DictReader((output / "runs.csv").open()) if row["method"] == "Wrong"]
    assert [row["status"] for row in rows] == ["failed"] * 4


def test_another_training_in_the_same_folder_is_refused(finished, place, tmp_path, capsys):
    file = write_study(place, tmp_path, STUDY.replace("epochs: 2", "epochs: 3"))
    assert compare(place, file, finished[1]) == 1
    assert "training.epochs was 2 and is 3" in capsys.readouterr().err
    file = write_study(place, tmp_path, STUDY.replace("r: 2", "r: 1"))
    assert compare(place, file, finished[1]) == 1
    assert "methods.0.r was 2 and is 1" in capsys.readouterr().err


def test_the_choice_does_not_see_the_test(place, tmp_path, monkeypatch):
    """With made-up results in which test and validation disagree, validation wins."""

    def train(self, run, values, again=False):
        val = {0.03: 0.9, 0.003: 0.5}.get(values["lr"], 0.5)
        results = {
            "val": {"accuracy": val},
            "test": {} if run.stage == "search" else {"accuracy": 1 - val},
            "settings": {"lr": values["lr"]},
            "seconds": {"total": 1.0, "training": 1.0},
            "parameters": {"adapter": 0, "head": 3, "backbone": 10, "percent": 0.0},
        }
        run.output.write_results(results)
        return results

    monkeypatch.setattr(trial.Workplace, "train", train)
    file = write_study(place, tmp_path)
    assert compare(place, file, tmp_path / "out") == 0
    grid = grid_of(place, file, tmp_path / "out")
    cells = {cell.variant.label: cell for cell in read_table(grid).cells}
    assert (cells["Linear"].lr, cells["Linear"].accuracies) == (0.03, (pytest.approx(0.1),) * 2)
    assert cells["LoRA + biases"].lr == 0.0005  # of equals the smallest
