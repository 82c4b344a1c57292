"""VTAB-1k as papers report it: checked against the published tables of VPT, and in a study's table."""

import json
from pathlib import Path

import pytest
import yaml
from picture_folders import write_tiny_backbone
from PIL import Image

from deltalens.cli.main import main
from deltalens.data.vtab1k import TASKS
from deltalens.studies.grid import Grid
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_table import read_table
from deltalens.studies.vtab import total_parameters, vtab_summary

# VPT (Jia et al. 2022), ViT-B/16 of ImageNet-21k: accuracies per task, in the order of TASKS
FULL = [68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8, 79.7, 95.7, 84.2, 73.9,
        56.3, 58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1]  # fmt: skip
LINEAR = [63.4, 85.0, 63.2, 97.0, 86.3, 36.6, 51.0, 78.5, 87.5, 68.6, 74.0,
          34.3, 30.6, 33.2, 55.4, 12.5, 20.0, 9.6, 19.2]  # fmt: skip
DEEP = [78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6, 81.8, 96.1, 83.4, 68.4,
        68.5, 60.0, 46.5, 72.8, 73.6, 47.9, 32.9, 37.8]  # fmt: skip
# prompts that were chosen for each task, then for CUB, NABirds, Flowers, Dogs, Cars; and the classes of those five
SHALLOW_PROMPTS = [100, 5, 1, 200, 50, 200, 1, 5, 50, 50, 10, 100, 200, 100, 100, 100, 100, 200, 200]
DEEP_PROMPTS = [10, 10, 10, 1, 1, 50, 5, 100, 100, 10, 1, 50, 200, 100, 50, 10, 50, 200, 200, 10, 50, 5, 100, 200]
FGVC_CLASSES = [200, 555, 102, 120, 196]
VIT_B, WIDTH, BLOCKS = 85_798_656, 768, 12


def by_task(values):
    return dict(zip(TASKS, values, strict=True))


# ------------------------------------------------------------------ the published numbers
@pytest.mark.parametrize(
    ("values", "groups", "wins"),
    [
        (FULL, (75.88, 83.36, 47.64), None),
        (LINEAR, (68.93, 77.16, 26.84), (1, 1, 0)),
        (DEEP, (78.48, 82.43, 54.98), (6, 2, 8)),
    ],
)
def test_group_means_and_wins(values, groups, wins):
    summary = vtab_summary(by_task(values), None if wins is None else by_task(FULL))
    assert tuple(summary.groups.values()) == pytest.approx(groups, abs=0.03)  # the tables round tasks to 0.1
    assert (None if wins is None else tuple(summary.wins.values())) == wins
    assert summary.complete
    assert summary.tasks == {"Natural": 7, "Specialized": 4, "Structured": 8}


def test_both_means():
    """Published from unrounded tasks, and here from tasks rounded to 0.1."""
    full, deep = vtab_summary(by_task(FULL)), vtab_summary(by_task(DEEP))
    assert (full.mean, full.mean_of_groups) == (pytest.approx(65.57, abs=0.01), pytest.approx(68.96, abs=0.02))
    assert (deep.mean, deep.mean_of_groups) == (pytest.approx(69.43, abs=0.01), pytest.approx(71.96, abs=0.02))


def test_total_parameters_of_24_tasks():
    """The column "Total params" of VPT's table 1: 19 tasks and five fine-grained sets."""
    classes = [task.classes for task in TASKS.values()] + FGVC_CLASSES
    heads = [(WIDTH + 1) * each for each in classes]

    def total(adapters):
        return round(total_parameters(VIT_B, adapters, heads), 2)

    assert total([VIT_B] * 24) == 24.02  # full fine-tuning: no copy of the pretrained weights is needed
    assert total([0] * 24) == 1.02
    assert total([WIDTH * BLOCKS * each for each in DEEP_PROMPTS]) == 1.18
    block = 12 * WIDTH**2 + 13 * WIDTH
    assert total([block] * 24) == 3.00  # Partial-1
    shallow = total_parameters(VIT_B, [WIDTH * each for each in SHALLOW_PROMPTS], heads[:19])
    assert shallow == pytest.approx(1 + (WIDTH * 1772 + sum(heads[:19])) / VIT_B)


def test_some_tasks_only_and_none():
    summary = vtab_summary({"svhn": 50.0, "kitti": 70.0, "dmlab": 40.0}, {"svhn": 50.0, "kitti": 60.0, "dmlab": 41.0})
    assert summary.groups == {"Natural": 50.0, "Structured": 55.0}
    assert summary.wins == {"Natural": 0, "Structured": 1}  # an equal number is no win
    assert (summary.mean, summary.mean_of_groups, summary.complete) == (pytest.approx(160 / 3), 52.5, False)
    assert vtab_summary({"svhn": 1.0, "kitti": 2.0}, {"svhn": 1.0}).wins is None
    with pytest.raises(ValueError, match="no task of VTAB-1k: mnist"):
        vtab_summary({"mnist": 1.0})
    with pytest.raises(ValueError, match="no tasks to summarise"):
        vtab_summary({})


# ------------------------------------------------------------------ in a study
@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two tasks in miniature, with lists, and a study of them with the protocol of the papers."""
    root = tmp_path_factory.mktemp("vtab")
    write_tiny_backbone(root / "tiny")
    for task, colours in (("eurosat", (60, 220)), ("kitti", (40, 200))):
        for name, count in (("train800", 8), ("val200", 4), ("test", 4)):
            folder = root / "vtab-1k" / task / "images" / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (colours[i % 2], 90, 10 * i)).save(folder / f"{i}.png")
            lines = "".join(f"images/{name}/{i}.png {i % 2}\n" for i in range(count))
            (root / "vtab-1k" / task / f"{name}.txt").write_text(lines)
    study = {
        "backbones": {"model": str(root / "tiny"), "label": "tiny"},
        "datasets": {
            task: {"path": str(root / "vtab-1k"), "format": f"vtab1k/{task}", "protocol": "trainval"}
            for task in ("eurosat", "kitti")
        },
        "methods": {"Full": "full", "Linear": "linear"},
        "seeds": [0],
        "lr": {"relative": [1, 0.1]},
        "training": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["compare", str(root / "study.yaml"), "--output", str(root / "out")]) == 0
    return root


def results(place: Path) -> dict[str, dict]:
    runs = place / "out/runs/tiny"
    return {f.parent.relative_to(runs).as_posix(): json.loads(f.read_text()) for f in runs.rglob("results.json")}


def test_rates_are_chosen_on_val_and_final_runs_train_on_it_too(place):
    found = results(place)
    assert len(found) == 2 * 2 * 3
    for name, each in found.items():
        final = name.endswith("seed-0")
        counts = tuple(each["data"][part] for part in ("train", "val", "test"))
        assert counts == ((12, 0, 4) if final else (8, 4, 0))
        assert ("accuracy" in each["val"], "accuracy" in each["test"]) == (not final, final)
        assert each["data"].get("protocol") == ("trainval" if final else None)
        assert "trained_in" not in each
    for cell in {name.rpartition("/")[0] for name in found}:
        searches = [each for name, each in found.items() if name.startswith(f"{cell}/lr-")]
        best = max(searches, key=lambda each: (each["val"]["accuracy"], -each["settings"]["lr"]))
        assert found[f"{cell}/seed-0"]["settings"]["lr"] == best["settings"]["lr"]


def test_the_table_of_a_study(place):
    found = results(place)
    text = (place / "out/table.md").read_text()
    section = text.partition("## VTAB-1k, tiny")[2].partition("\n## ")[0]
    header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "method", "total params", "Specialized (1)", "Structured (1)", "mean of 2", "mean of 2 groups",
    ]  # fmt: skip
    cells = {row.strip("|").split("|")[0].strip(): [cell.strip() for cell in row.strip("|").split("|")] for row in rows}
    accuracy = {
        (task, method): 100 * found[f"{task}/{method}/seed-0"]["test"]["accuracy"]
        for task in ("eurosat", "kitti")
        for method in ("Full", "Linear")
    }
    wins = int(accuracy["eurosat", "Linear"] > accuracy["eurosat", "Full"])
    assert cells["Linear"][2] == f"{accuracy['eurosat', 'Linear']:.2f} ({wins})"
    assert cells["Full"][3] == f"{accuracy['kitti', 'Full']:.2f}"
    assert cells["Linear"][4] == f"{(accuracy['eurosat', 'Linear'] + accuracy['kitti', 'Linear']) / 2:.2f}"
    backbone = found["kitti/Linear/seed-0"]["parameters"]["backbone"]
    heads = 25 * (10 + 4)
    assert cells["Linear"][1] == f"{1 + heads / backbone:.2f}x"
    assert cells["Full"][1] == f"{2 + heads / backbone:.2f}x"
    assert "Only 2 of the 19 tasks" in section
    assert "Final runs on eurosat, kitti train on training and validation data together." in text


def test_nothing_is_done_twice_and_other_studies_have_no_such_table(place, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in (place / "out/runs").rglob("*")}
    assert main(["compare", str(place / "study.yaml"), "--output", str(place / "out")]) == 0
    assert {file: file.stat().st_mtime_ns for file in (place / "out/runs").rglob("*")} == before
    study = read_study(place / "study.yaml", {"photos": str(place)})
    table = read_table(Grid(study, tmp_path))
    assert table.vtab_tasks == {}
    assert "VTAB" not in table.to_markdown()
    empty = read_table(Grid(read_study(place / "study.yaml"), tmp_path)).to_markdown()
    assert "| Linear |            - |" in empty


def test_a_wrong_protocol_is_named(place, tmp_path):
    text = (place / "study.yaml").read_text().replace("trainval", "both")
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"protocol.*expected val or trainval, got 'both'"):
        read_study(tmp_path / "study.yaml")


def test_training_without_validation(place, tmp_path, capsys):
    words = ["train", "--model", str(place / "tiny"), "--data", str(place / "vtab-1k"), "--format", "vtab1k/kitti"]
    words += ["--protocol", "trainval", "--epochs", "2", "--batch-size", "4", "--output", str(tmp_path / "run")]
    assert main(words) == 0
    assert "12 training, no validation, 4 test images" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert found["val"] == {}
    assert len(found["history"]) == 2
    assert found["data"]["format"] == "vtab1k/kitti"
    words = ["evaluate", str(tmp_path / "run"), "--data", str(place / "vtab-1k"), "--output", str(tmp_path / "e")]
    assert main(words) == 0
    assert json.loads((tmp_path / "e").read_text())["accuracy"] == found["test"]["accuracy"]
