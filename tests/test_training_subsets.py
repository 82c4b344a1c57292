"""Fewer training images: nested, stratified, the same for every method; on the command line and in studies."""

import json
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_folders import write_pictures
from study_fixtures import compare, place, results_of, write_study  # noqa: F401
from study_runs import study_text, table_of, write_study_folder

from deltalens.cli.main import main
from deltalens.data import ArrayDataset, ReadOptions, Splits, TrainingSubset, read_data, read_part
from deltalens.studies import trial
from deltalens.studies.study_details import Details
from deltalens.studies.study_panels import image_panels, panel_plot, size_panels
from deltalens.studies.study_plots import method_numbers, write_plots
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_report import render_study_report

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
FRACTIONS = st.lists(st.floats(0.01, 1, allow_nan=False), min_size=2, max_size=2).map(sorted)


# ------------------------------------------------------------------ what is drawn
@settings(max_examples=60, deadline=None)
@given(LABELS, FRACTIONS, st.integers(0, 5))
def test_fractions_are_nested_and_hold_the_share_of_every_class(labels, fractions, seed):
    smaller, larger = (TrainingSubset(fraction, seed=seed).indices(labels) for fraction in fractions)
    assert set(smaller) <= set(larger)
    assert smaller == sorted(set(smaller))
    for label in set(labels):
        count = labels.count(label)
        assert sum(labels[i] == label for i in larger) == max(1, round(fractions[1] * count))
    assert TrainingSubset(1.0, seed=seed).indices(labels) == list(range(len(labels)))


def test_several_labels_count_by_the_rarest_and_images_without_any_are_a_class():
    rows = [[1, 0, 0]] * 8 + [[1, 1, 0]] * 4 + [[0, 0, -1]] * 4
    labels = [torch.tensor(row, dtype=torch.int8) for row in rows]
    found = TrainingSubset(0.5).indices(labels)
    assert [sum(i in span for i in found) for span in (range(8), range(8, 12), range(12, 16))] == [4, 2, 2]


def test_seeds_draw_other_images_and_the_same_seed_the_same():
    labels = [0, 1] * 50
    drawn = [TrainingSubset(0.2, seed=seed).indices(labels) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_any_dataset_with_labels_in_its_items():
    items = [(torch.zeros(1), label) for label in [0, 1] * 5]
    splits = TrainingSubset(0.4).take(Splits(items, items, ["a", "b"]))
    assert sorted(splits.train[i][1] for i in range(len(splits.train))) == [0, 0, 1, 1]
    arrays = ArrayDataset(torch.zeros(10, 1, 4, 4), [0, 1] * 5)
    assert isinstance(TrainingSubset(0.5).of(arrays), ArrayDataset)
    assert len(splits.val) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.0}, "must lie above 0 and not above 1, got 0"),
        ({"fraction": 1.5}, "must lie above 0 and not above 1, got 1.5"),
    ],
)
def test_impossible_shares_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingSubset(**wrong)


def test_train_and_val_together_are_drawn_from_as_one_and_read_again_for_measuring(tmp_path):
    write_pictures(tmp_path, 20)
    options = ReadOptions(0.25, 0.25, seed=3)
    splits = TrainingSubset(0.5, seed=3).take(read_data(tmp_path, protocol="trainval", options=options))
    whole = read_data(tmp_path, options=options)
    assert (len(splits.train), splits.val, len(splits.test)) == (24, None, 15)  # of 3 x (10 + 5) images: 3 x 8
    assert set(splits.train.paths) & set(whole.val.paths)
    again = read_part(tmp_path, "train", splits.class_names, splits.origin)
    assert again.paths == splits.train.paths
    assert len(read_part(tmp_path, "test", splits.class_names, splits.origin)) == 15


# ------------------------------------------------------------------ on the command line
def test_train_and_tune_take_fewer_images(place, tmp_path, capsys):  # noqa: F811
    photos = write_pictures(tmp_path / "photos", 12)
    words = ["--model", str(place / "model"), "--method", "linear", "--data", str(photos), "--epochs", "1"]
    words += ["--warmup-epochs", "0", "--val-fraction", "0.25", "--test-fraction", "0.25"]
    runs = {"half": ["--train-fraction", "0.5"], "other": ["--train-fraction", "0.5", "--seed", "1"]}
    for name, own in runs.items():
        assert main(["train", *words, *own, "--split-seed", "4", "--output", str(tmp_path / name)]) == 0
    facts = [json.loads((tmp_path / name / "results.json").read_text())["data"] for name in runs]
    assert facts[0] == facts[1]
    assert {key: facts[0][key] for key in ("train", "val", "test", "training_images_in_all")} == {
        "train": 9, "val": 9, "test": 9, "training_images_in_all": 18,
    }  # fmt: skip
    assert facts[0]["training_subset"] == {"fraction": 0.5, "seed": 4}
    config = yaml.safe_load((tmp_path / "half/config.yaml").read_text())
    assert (config["train_fraction"], config["shots"], config["split_seed"]) == (0.5, None, 4)
    assert main(["evaluate", str(tmp_path / "half"), "--data", str(photos), "--split", "train"]) == 0
    assert "9 (train)" in capsys.readouterr().out
    search = [*words, "--shots", "2", "--trials", "1", "--output", str(tmp_path / "search")]
    assert main(["tune", *search]) == 0
    found = json.loads((tmp_path / "search/trials/000/results.json").read_text())["data"]
    assert [found[name] for name in ("train", "val", "shots", "shots_seed")] == [6, 6, 2, 0]
    assert main(["train", *words, "--shots", "2", "--train-fraction", "1", "--output", str(tmp_path / "no")]) == 1
    assert "give one of them" in capsys.readouterr().err


# ------------------------------------------------------------------ in a study
def test_a_study_file_makes_a_dataset_of_every_amount(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "backbones: deltalens/vit-mini\nmethods: {Linear: linear}\nshots: [4, 1]\nsplit: {seed: 7}\n"
        "datasets:\n  a: {path: x, fractions: [0.25, 0.1, 1], hflip: 0, protocol: trainval}\n  b: y\n"
    )
    study = read_study(file, {"c": "z", "a": "w"})
    names = ["a@10%", "a@25%", "a@100%", "b@1 shot", "b@4 shots", "c@1 shot", "c@4 shots"]
    assert [dataset.name for dataset in study.datasets] == names
    assert [dataset.source for dataset in study.datasets] == ["a"] * 3 + ["b"] * 2 + ["c"] * 2
    assert study.datasets[1].subset == TrainingSubset(0.25, seed=7)
    assert [dataset.shots for dataset in study.datasets] == [None] * 3 + [1, 4] * 2
    assert {(d.path, d.hflip, d.protocol) for d in study.datasets[:3]} == {("w", 0, "trainval")}
    assert study.scatter_datasets == ("a@100%", "b@4 shots")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: x, fractions: [0.1], shots: [1]}", r"line 4, datasets\.a\.shots: .*give one of them"),
        ("{path: x, fractions: []}", r"datasets\.a\.fractions: expected numbers such as \[0\.1"),
        ("{path: x, fractions: [0.5, 0]}", r"datasets\.a\.fractions\.1: the fraction .* got 0"),
        ("{path: x, shots: [1.5]}", r"datasets\.a\.shots\.0: expected a whole number above 0, got 1\.5"),
        ("{path: x, shots: [1], protocol: trainval}", r"datasets\.a: shots .* trainval would join them: use val"),
        ("{path: x, shots: [2, 2]}", r"datasets\.a\.shots\.1: 2 stands here a second time"),
        ("{path: x, shots: [2]}\n  a@2 shots: y", r"line 5, datasets\.a@2 shots: .* would share the folder"),
    ],
)
def test_mistakes_in_amounts_are_named(entry, message, tmp_path):
    text = f"backbones: deltalens/vit-mini\nmethods: {{Linear: linear}}\ndatasets:\n  a: {entry}\n"
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "study.yaml")


AMOUNTS = """\
backbones: {model: MODEL, label: tiny}
FIELD: [SMALL, LARGE]
datasets:
  photos: {protocol: PROTOCOL}
methods: {Linear: linear, LoRA: {method: lora, r: 2}}
seeds: [0, 1]
lr: {relative: [1, 0.1]}
training: {epochs: 1, batch_size: 8, warmup_epochs: 0, min_crop: 1, hflip: 0}
"""


def seen_by_fit(monkeypatch, root):
    """Folder of a run -> (its training images, how many, its data)."""
    seen = {}

    def fit(task, data, settings, folder, **options):
        images = [tuple(image.flatten()[:40].tolist()) for image in data.train.images]
        seen[folder.relative_to(root).as_posix()] = (set(images), len(images), data)
        return trained(task, data, settings, folder, **options)

    trained = trial.fit
    monkeypatch.setattr(trial, "fit", fit)
    return seen


@pytest.mark.parametrize("protocol", ["val", "trainval"])
def test_a_study_trains_on_the_same_shares_with_every_method_and_goes_on(place, tmp_path, monkeypatch, protocol):  # noqa: F811
    seen = seen_by_fit(monkeypatch, tmp_path / "out/runs/tiny")
    text = AMOUNTS.replace("PROTOCOL", protocol).replace("FIELD", "fractions")
    file = write_study(place, tmp_path, text.replace("SMALL", "0.25").replace("LARGE", "0.5"))
    assert compare(place, file, tmp_path / "out", "--cache-features", str(tmp_path / "features")) == 0
    small, large = (
        {path: found for path, found in seen.items() if path.startswith(f"photos-{share}/")} for share in (25, 50)
    )
    for found, share in ((small, 0.25), (large, 0.5)):
        joined = 12 if protocol == "trainval" else 8
        for path, (_, count, _) in found.items():
            assert count == 3 * share * (8 if "lr-" in path else joined)
        stages = [[p for p in found if ("lr-" in p) == search] for search in (True, False)]
        assert all(len({frozenset(found[path][0]) for path in paths}) == 1 for paths in stages)
    assert all(small[path][0] < large[path.replace("photos-25/", "photos-50/")][0] for path in small)
    assert {len(data.val) for path, (_, _, data) in seen.items() if "lr-" in path} == {12}
    runs = results_of(tmp_path / "out")
    assert {r["data"]["test"] for path, r in runs.items() if "seed" in path} == {18}
    assert all("features" in found for path, found in runs.items() if "Linear/lr" in path)
    before = len(seen)
    lost = next(path for path in runs if path.endswith("50/LoRA/seed-1"))
    (tmp_path / "out/runs" / lost / "results.json").unlink()
    assert compare(place, file, tmp_path / "out") == 0
    assert len(seen) == before  # the one that was lost is trained again, in the same folder
    again = results_of(tmp_path / "out")
    assert again[lost]["test"] == runs[lost]["test"]
    plots = {path.name for path in (tmp_path / "out/plots").iterdir()}
    assert {"tiny-photos-training-images.svg", "tiny-storage.svg"} <= plots
    changed = write_study(place, tmp_path, file.read_text() + "split: {seed: 3}\n")
    assert compare(place, changed, tmp_path / "out") == 1


def test_shots_of_a_study_are_drawn_by_the_seed_of_each_run(place, tmp_path, monkeypatch):  # noqa: F811
    seen = seen_by_fit(monkeypatch, tmp_path / "out/runs/tiny")
    text = AMOUNTS.replace("PROTOCOL", "val").replace("FIELD", "shots")
    file = write_study(place, tmp_path, text.replace("SMALL", "2").replace("LARGE", "4"))
    assert compare(place, file, tmp_path / "out") == 0
    for shots in (2, 4):
        found = {path: each for path, each in seen.items() if path.startswith(f"photos-{shots}-shots/")}
        assert {count for _, count, _ in found.values()} == {3 * shots}
        assert {len(data.val) for _, _, data in found.values()} == {3 * shots}
        by_seed = [{frozenset(each[0]) for path, each in found.items() if path.endswith(end)} for end in ("0", "1")]
        assert len(by_seed[1]) == 1
        wanted = read_data(place / "photos", options=ReadOptions(shots=shots, shots_seed=1)).train
        assert len(wanted) == 3 * shots
        search = {frozenset(each[0]) for path, each in found.items() if "/lr-" in path}
        assert len(search) == 1
        assert search.isdisjoint(by_seed[1])
    facts = [r["data"] for path, r in results_of(tmp_path / "out").items() if path.endswith("seed-1")]
    assert {(each["shots_seed"], each["shots_from"], each["test"]) for each in facts} == {(1, "drawn", 18)}


def test_curves_over_images_and_over_the_size_of_the_backbone(tmp_path):
    grid = write_study_folder(tmp_path, study_text(extra="fractions: [0.25, 0.5, 1]"))
    table = table_of(grid)
    numbers = method_numbers(table.cells)
    panels = image_panels(table)
    assert [panel.title for panel in panels][:2] == ["ViT-S, flowers", "ViT-S, pets"]
    assert len(panels) == 6
    drawn = panel_plot(panels[0], numbers)
    means = [c for c in table.cells if c.backbone == "ViT-S" and c.variant.label == "Full" and "flowers@" in c.dataset]
    assert [c.training_images for c in means] == [1020, 2040, 4080]
    for cell in means:
        assert f"Full, {cell.training_images:,}: {100 * cell.mean:.1f} %" in drawn
    assert drawn.count('class="c4 line"') == 4  # its curve, and a bar of the deviation at each place
    sizes = size_panels(table)
    assert sizes[0].title == "flowers@100%: ViT-S 21.7 M, Swin-T 27.5 M"
    assert len(sizes) == 3
    mona = next(c for c in sizes[0].cells if c.variant.label == "Mona" and c.backbone == "Swin-T")
    assert f"Mona, 27.5 M: {100 * mona.mean:.1f} %" in panel_plot(sizes[0], numbers)
    page = render_study_report(table, grid.study, Details())
    assert "Accuracy against training images" in page
    assert "Accuracy against the size of the backbone" in page
    names = {file.name for file in write_plots(table, tmp_path / "plots", "x")}
    assert {"ViT-S-flowers-training-images.svg", "flowers-100-backbones.svg"} <= names


def test_a_study_of_whole_sets_on_one_backbone_has_no_such_curves(tmp_path):
    table = table_of(write_study_folder(tmp_path, study_text(backbones=["ViT-S"])))
    assert image_panels(table) == size_panels(table) == []


def test_places_on_the_axis_are_logarithmic(tmp_path):
    table = table_of(write_study_folder(tmp_path, study_text(backbones=["ViT-S"], extra="fractions: [0.25, 0.5, 1]")))
    drawn = panel_plot(image_panels(table)[0], method_numbers(table.cells))
    marks = [float(x) for x in re.findall(r'x="([\d.]+)" y="\d+" text-anchor="middle">[\d,]+<', drawn)]
    assert len(marks) == 3
    assert marks[1] - marks[0] == pytest.approx(marks[2] - marks[1], abs=0.2)  # twice as many, and twice again
