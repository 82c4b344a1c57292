"""The recipes of CLIP's methods: rows, sizes, data, published numbers; two of them run small."""

import json
import shutil
import statistics

import pytest
from clip_checks import vit_b16
from coop_folders import write_imagenet, write_split_file
from hub_cache import write_open_clip
from test_recipes import STUDIES, row, study_of

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.coop import SETS
from deltalens.data.prompts import TEMPLATES
from deltalens.studies.grid import Grid
from deltalens.studies.harmonic_mean import harmonic_mean
from deltalens.studies.recipe_files import summary

NAMES = [name for name in STUDIES if name.startswith("mma/")]
PARAMETERS = {  # of ViT-B/16
    "CLIP": 0, "CoOp": 2048, "CoCoOp": 35_360, "KgCoOp": 2048, "ProGrad": 8192, "MaPLe": 3_555_072, "RPO": 30_720,
    "LASP": 39_424, "MMA": 674_560,
}  # fmt: skip


def numbers(study, source=0) -> dict[tuple[str, str], dict[str, float]]:
    found: dict = {}
    for score in study.published[source].scores:
        found.setdefault((score.label, score.column), {})[score.metric] = score.percent
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_be_read_and_says_how_it_is_started(name, tmp_path):
    study = study_of(name)
    assert f": deltalens compare {name} --data FOLDER --output DIR" in summary(STUDIES[name])
    assert study.protocol == ("fair" if name.endswith("-fair") else "published")
    assert (study.seeds, study.reference_label) == ((1, 2, 3), "CLIP")
    formats = [each.format.partition("/") for each in (*study.datasets, *study.targets)]
    assert all(kind == "coop" and which in SETS for kind, _, which in formats)
    assert {dataset.shots for dataset in study.datasets} == ({1, 2, 4, 8, 16} if "few-shot" in name else {16})
    assert len(list(Grid(study, tmp_path).runs())) > 20


@pytest.mark.parametrize("label", PARAMETERS)
def test_rows_have_the_published_sizes(label):
    model = vit_b16()
    dl.attach(model, list(row(study_of("mma/base2novel"), label).methods))
    assert dl.count_parameters(model).adapter == PARAMETERS[label]


def test_mma_is_trained_as_published():
    study = study_of("mma/base2novel")
    for dataset, batch in (("dtd", 16), ("imagenet", 128)):
        variant = row(study, "MMA", dataset)
        training = study.training_of(variant)
        assert (training.batch_size, training.epochs, training.optimizer, training.weight_decay) == (
            batch,
            5,
            "sgd",
            5e-4,
        )
        assert (training.schedule, training.warmup_epochs, training.no_decay) == ("epoch", 0, ())
        assert study.candidates(variant)[0].values == {"lr": 0.0015}
    across = row(study_of("mma/cross-dataset"), "MMA")
    training = study_of("mma/cross-dataset").training_of(across)
    assert (across.methods[0].start, training.batch_size, training.epochs) == (9, 128, 1)
    assert row(study_of("mma/cross-dataset"), "MaPLe").methods[0].depth == 3


def test_zero_shot_has_the_template_of_each_dataset():
    study = study_of("mma/base2novel")
    for dataset in study.datasets:
        templates = {**study.backbones[0].options, **row(study, "CLIP", dataset.name).backbone}["templates"]
        assert templates == [TEMPLATES[dataset.format.partition("/")[2]]]
        assert "templates" not in row(study, "MMA", dataset.name).backbone


def test_published_numbers_agree_with_their_means():
    study = study_of("mma/base2novel")
    found = numbers(study)
    for label, wanted in {"CLIP": 71.70, "CoOp": 71.66, "CoCoOp": 75.83, "MaPLe": 78.55, "MMA": 79.87}.items():
        mean = found[label, "mean"]
        assert harmonic_mean(mean["base"], mean["novel"]) == pytest.approx(wanted, abs=0.011)
        for half in ("base", "novel"):
            each = [found[label, dataset.name][half] for dataset in study.datasets]
            assert statistics.fmean(each) == pytest.approx(mean[half], abs=0.011), (label, half)
    across = study_of("mma/cross-dataset")
    found = numbers(across)
    for label, wanted in {"CoOp": 63.88, "CoCoOp": 65.74, "MaPLe": 66.30, "MMA": 66.61}.items():
        assert statistics.fmean(found[label, each.name][""] for each in across.targets) == pytest.approx(
            wanted, abs=0.011
        )
    shifted = study_of("mma/domain-generalisation")
    found = numbers(shifted)
    for label, wanted in {"CLIP": 57.18, "CoOp": 59.28, "CoCoOp": 59.91, "MaPLe": 60.27, "MMA": 60.48}.items():
        assert statistics.fmean(found[label, each.name][""] for each in shifted.targets) == pytest.approx(
            wanted, abs=0.011
        )


SMALL = """\
base: {name}
backbones: [{{label: ViT-B/16, model: {model}, options: {{templates: ["a {{}}."]}}}}]
seeds: [1]
methods: {{CoCoOp: null, KgCoOp: null, ProGrad: null, RPO: null, LASP: null,
  CoOp: {{init: "a", training: {{epochs: 1, batch_size: 8}}}},
  MaPLe: {{depth: 2, init: "a b", training: {{epochs: 1}}}}, MMA: {{start: 2, bottleneck: 4, training: {{epochs: 1}}}}}}
"""


def compare(tmp_path, name: str, more: str, *folders: str) -> tuple[str, list[dict]]:
    """(table.md, results) of a recipe on a small model."""
    write_open_clip(tmp_path / "model", depth=3)
    (tmp_path / "small.yaml").write_text(SMALL.format(name=name, model=tmp_path / "model") + more)
    words = ["compare", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert main([*words, *(word for folder in folders for word in ("--data", folder))]) == 0
    results = [json.loads(file.read_text()) for file in (tmp_path / "out/runs").rglob("results.json")]
    return (tmp_path / "out/table.md").read_text(), results


def test_base_to_novel_runs_small(tmp_path):
    names = ("ant", "bee", "cat", "dog")
    for folder, file, images in (
        ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
        ("dtd", "split_zhou_DescribableTextures.json", "images"),
    ):
        write_split_file(tmp_path / "sets" / folder, file, images, names)
    folders = (f"caltech101={tmp_path / 'sets'}", f"dtd={tmp_path / 'sets/dtd'}")
    page, results = compare(tmp_path, "mma/base2novel", "published: null\n", *folders)
    assert len(results) == 2 * 4
    assert {(each["data"]["train"], each["data"]["classes"]) for each in results} == {(10, 2)}
    assert {each["transfer"]["novel"]["images"] for each in results} == {4}
    assert "## Base to novel, ViT-B/16: average of 2 datasets" in page
    assert "Left out, since no folder was given: imagenet, oxford_pets" in page


def test_a_shift_of_domain_runs_small_with_published_numbers_beside(tmp_path):
    write_imagenet(tmp_path / "imagenet")
    shutil.copytree(tmp_path / "imagenet/images/val", tmp_path / "imagenet-rendition/imagenet-r")
    folders = (f"imagenet={tmp_path}", f"imagenet_r={tmp_path}")
    page, _ = compare(tmp_path, "mma/domain-generalisation", "published: {scores: {CoCoOp: null}}\n", *folders)
    table = page.partition("## From imagenet to other datasets, ViT-B/16\n")[2].partition("\n## ")[0]
    lines = {cells[0].strip(): cells[1:] for cells in (line.strip("|").split("|") for line in table.splitlines())}
    assert [cell.strip() for cell in lines["MMA, published"]] == ["71", "77.32", "77.32"]
    assert 0 <= float(lines["MMA"][1]) <= 100
