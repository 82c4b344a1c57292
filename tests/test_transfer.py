"""Runs of a study on the novel half of the classes and on other datasets, and the papers' tables of it."""

import csv
import json
import re

import pytest
import torch
from hub_cache import write_open_clip
from picture_folders import write_pictures
from study_fixtures import results_of
from study_runs import made_up_accuracy, study_text, table_of, write_study_folder

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data import ReadOptions, eval_transform, read_data
from deltalens.studies.harmonic_mean import harmonic_mean
from deltalens.studies.study_latex import to_latex
from deltalens.studies.study_plots import halves_plots, method_numbers, write_plots
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_report import write_study_report
from deltalens.studies.transfer_table import transfer_tables

COLOURS = {
    "blue": (40, 60, 200),
    "green": (50, 180, 60),
    "grey": (120, 120, 120),
    "red": (200, 40, 50),
    "sun": (250, 230, 60),
}
STUDY = """\
title: Colours
backbones: {model: MODEL, label: tiny, options: {templates: ["a photo of a {}."]}}
base_to_novel: true
shots: 3
targets: {others: OTHERS}
methods:
  MMA: {method: mma, start: 2, bottleneck: 4, alpha: 0.1}
  Words: {method: coop, per_class: true, num_words: 2}
  Probe: {method: linear, backbone: {templates: null}}
seeds: [1, 2]
lr: 0.01
training: {epochs: 1, batch_size: 4, warmup_epochs: 0, min_crop: 1, hflip: 0}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, its study's output): five colours, two-tower model, three methods."""
    root = tmp_path_factory.mktemp("transfer")
    write_open_clip(root / "model", depth=3)
    for seed, (part, count) in enumerate({"train": 5, "val": 3, "test": 6}.items()):
        write_pictures(root / "photos" / part, count, seed, COLOURS)
        write_pictures(root / "others" / part, count, seed + 7, {"cyan": (40, 200, 200), "red": (200, 40, 50)})
    text = STUDY.replace("MODEL", str(root / "model")).replace("OTHERS", str(root / "others"))
    (root / "study.yaml").write_text(text)
    assert (
        main(
            ["compare", str(root / "study.yaml"), "--data", f"photos={root / 'photos'}", "--output", str(root / "out")]
        )
        == 0
    )
    return root, root / "out"


def accuracy(model, data) -> float:
    data.test.transform = eval_transform(dl.preprocessing(model))
    images, labels = zip(*(data.test[i] for i in range(len(data.test))), strict=True)
    with torch.no_grad():
        said = model.eval()(torch.stack(images)).argmax(1)
    return float((said == torch.tensor(labels)).float().mean())


def test_each_run_is_measured_where_it_was_not_trained(finished):
    root, output = finished
    run = output / "runs/tiny/photos/MMA/seed-2"
    found = json.loads((run / "results.json").read_text())
    assert (found["data"]["classes"], found["data"]["shots"], found["data"]["shots_seed"]) == (3, 3, 2)
    assert [found["data"][part] for part in ("train", "val", "test")] == [9, 9, 18]
    model = dl.from_pretrained(run)
    assert dl.class_names(model) == ["blue", "green", "grey"]
    novel = read_data(root / "photos", options=ReadOptions(subset="new"))
    assert novel.class_names == ["red", "sun"]
    wanted = {"novel": (novel, 12, 2), "others": (read_data(root / "others"), 12, 2)}
    for name, (data, images, classes) in wanted.items():
        measured = found["transfer"][name]
        assert (measured["images"], measured["classes"]) == (images, classes)
        model.set_classes(data.class_names)
        assert measured["accuracy"] == pytest.approx(accuracy(model, data), abs=1e-6)


def test_models_that_are_bound_to_their_classes_say_so(finished):
    runs = results_of(finished[1])
    words, probe = (runs[f"tiny/photos/{name}/seed-1"]["transfer"] for name in ("Words", "Probe"))
    assert set(words) == set(probe) == {"novel", "others"}
    assert "classes" in words["novel"]["refused"]
    assert "head" in probe["others"]["refused"]
    assert runs["tiny/photos/Probe/seed-1"]["parameters"]["head"] > 0
    assert runs["tiny/photos/MMA/seed-1"]["parameters"]["head"] == 0


def test_pages_of_a_study_have_the_tables(finished):
    _, output = finished
    page, lines = (output / "table.md").read_text(), list(csv.DictReader((output / "runs.csv").open()))
    runs = results_of(output)
    of = [runs[f"tiny/photos/MMA/seed-{seed}"] for seed in (1, 2)]
    base, novel = (sum(values) / 2 for values in (
        [each["test"]["accuracy"] for each in of], [each["transfer"]["novel"]["accuracy"] for each in of]
    ))  # fmt: skip
    row = re.search(r"## Base to novel, tiny: photos\n.*?\| MMA +\|([^\n]*)", page, re.S)[1]
    numbers = [float(cell.split("±")[0]) for cell in row.strip(" |").split("|")]
    assert numbers == pytest.approx([100 * each for each in (base, novel, harmonic_mean(base, novel))], abs=0.051)
    assert "From photos to other datasets, tiny" in page
    assert re.search(r"\| Words +\| [^|]+\| +- \| +- \|", page)
    assert "Runs are trained on the first half of the classes" in page
    assert {line["on novel"] for line in lines if line["method"] == "Probe"} == {""}
    assert (
        float(lines[0]["on others"]) == runs[lines[0]["folder"].removeprefix("runs/")]["transfer"]["others"]["accuracy"]
    )
    assert "Base to novel, tiny: photos" in (output / "report.html").read_text()
    assert r"\label{tab:colours-base-to-novel-tiny-photos}" in (output / "table.tex").read_text()


# ------------------------------------------------------------------ tables
PUBLISHED = """\
base_to_novel: true
targets: {elsewhere: nowhere/7, far: nowhere/8}
published:
  source: A paper
  scores:
    LoRA: {flowers: {base: 80, novel: 60}, mean: {base: 83.20, novel: 76.80}, elsewhere: 50, far: 51, pets: 70}
  not_run:
    Other: {flowers: {base: 90, novel: 45}, elsewhere: 40}
"""


@pytest.fixture
def made_up(tmp_path):
    """Two datasets; novel accuracy is base minus 0.1, Mona has none on pets; elsewhere 0.3, far 0.5."""
    datasets = {"flowers": (0.78, 102), "pets": (0.83, 37)}
    backbones = {"ViT-S": (21_665_664, 384, 0.0)}
    text = study_text(datasets=datasets, backbones=backbones, extra=PUBLISHED)
    grid = write_study_folder(tmp_path, text, made_up_accuracy)
    for run in grid.runs():
        found = run.output.read_results()
        novel = {"accuracy": found["test"]["accuracy"] - 0.1}
        if run.variant.label == "Mona" and run.dataset.name == "pets":
            novel = {"refused": "it knows its own classes only"}
        found["transfer"] = {"novel": novel, "elsewhere": {"accuracy": 0.3}, "far": {"accuracy": 0.5}}
        run.output.write_results(found)
    return grid, table_of(grid)


def test_the_average_is_of_means_and_h_is_of_the_averages(made_up):
    _, table = made_up
    average, flowers, pets, from_flowers, _ = transfer_tables(table)
    assert "average of 2 datasets" in average.title
    assert (average.header, from_flowers.header) == (("base", "novel", "H"), ("flowers", "elsewhere", "far", "average"))
    bases = [
        next(c for c in table.cells if (c.variant.label, c.dataset) == ("LoRA", d)).mean for d in ("flowers", "pets")
    ]
    base, novel, h = (score.value for score in average.body["LoRA"])
    assert base == pytest.approx(sum(bases) / 2)
    assert novel == pytest.approx(sum(bases) / 2 - 0.1)
    assert h == pytest.approx(2 / (1 / base + 1 / novel))
    assert flowers.body["LoRA"][0].spread is not None
    assert [score.text for score in pets.body["Mona"]][1:] == ["-", "-"]
    assert [score.text for score in average.body["Mona"]][1:] == ["-", "-"]
    assert "Mona: it knows its own classes only." in pets.note
    assert [score.text for score in from_flowers.body["Full"]][1:] == ["30.0 ± 0.0", "50.0 ± 0.0", "40.0"]


def test_published_numbers_stand_below_and_apart(made_up, tmp_path):
    grid, table = made_up
    average, flowers, pets, from_flowers, from_pets = transfer_tables(table)
    assert average.published == (("LoRA, published", ("83.2", "76.8", "79.87")),)
    assert flowers.published == (
        ("LoRA, published", ("80", "60", "68.57")), ("Other, published", ("90", "45", "60.00")),
    )  # fmt: skip
    assert pets.published == ()
    assert from_flowers.published[0] == ("LoRA, published", ("-", "50", "51", "50.50"))
    assert from_pets.published[0] == ("LoRA, published", ("70", "50", "51", "50.50"))
    assert from_flowers.published[1] == ("Other, published", ("-", "40", "-", "-"))
    write_study_report(grid, table, tmp_path / "report.html")
    page, text, latex = (tmp_path / "report.html").read_text(), table.to_markdown(), to_latex(table)
    for written in (page, text, latex):
        assert "79.87" in written
        assert "published, base" not in written
    assert best_of(flowers)[0] in text


def test_base_and_novel_are_drawn_with_the_reference_dashed(made_up, tmp_path):
    grid, table = made_up
    (svg,) = halves_plots(table, method_numbers(table.cells)).values()
    assert svg.count('class="c4 reference"') == 1
    assert svg.count("reference") == 1
    assert "Mona" not in svg  # without a number on pets
    files = {path.name for path in write_plots(table, tmp_path / "plots", "x")}
    assert "ViT-S-base-to-novel.svg" in files
    write_study_report(grid, table, tmp_path / "report.html")
    assert "<h2>Base and novel classes</h2>" in (tmp_path / "report.html").read_text()


def best_of(found) -> list[str]:
    return [f"{100 * value:.1f}" for value in found.best()]


def test_without_other_data_there_are_no_such_tables(tmp_path):
    assert transfer_tables(table_of(write_study_folder(tmp_path))) == []


def test_a_target_without_a_folder_is_left_out_where_others_are_given(tmp_path):
    text = (
        "backbones: deltalens/vit-mini\nmethods: {Linear: linear}\ndatasets: {a: }\ntargets: {b: {format: csv}, c: }\n"
    )
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(tmp_path / "study.yaml", {"a": "x", "b": "y"})
    assert [(d.name, d.path, d.format) for d in study.targets] == [("b", "y", "csv")]
    assert study.left_out == ("c",)
    assert [d.path for d in read_study(tmp_path / "study.yaml", {"": "z"}).targets] == ["z", "z"]
    (tmp_path / "study.yaml").write_text(text.replace("c: }", "c: {shots: 1}}"))
    with pytest.raises(ValueError, match=r"targets\.c\.shots"):
        read_study(tmp_path / "study.yaml", {"": "z"})
