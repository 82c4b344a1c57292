"""The recipes on point clouds: readable, with the papers' settings and numbers, and carried out on a small scale."""

import json
from pathlib import Path

import pytest
import torch
from cloud_folders import TINY, use_tiny_points
from test_cloud_formats import write_cache, write_modelnet

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.cloud_transforms import pool_size
from deltalens.models.point_transformer import PointTransformer
from deltalens.studies.recipe_files import recipe_files, summary
from deltalens.studies.study_reader import read_study

STUDIES = {name: file for name, file in recipe_files("compare").items() if name.startswith("points/")}
PEERS = {"IDPT": 1_696_783, "Point-PEFT": 710_749, "DAPT": 1_087_771, "Adapter-X (DAPT-X)": 415_087}
ROWS = ["Full", "Linear", "BitFit", "LoRA", "Adapter", "AdaptFormer", "VPT-deep", *PEERS]


def study_of(name: str):
    return read_study(STUDIES[f"points/{name}"], {"": "nowhere"})


@pytest.mark.parametrize("name", ["scanobjectnn", "modelnet40"])
def test_two_protocols_of_each(name):
    fair, paper = study_of(name), study_of(f"{name}-published")
    for study, file in ((fair, name), (paper, f"{name}-published")):
        assert f": deltalens compare points/{file} --data " in summary(STUDIES[f"points/{file}"])
        assert [variant.label for variant in study.variants] == ROWS
        assert len(study.seeds) == 3
        assert study.published == fair.published
    assert (fair.protocol, paper.protocol) == ("fair", "published")
    assert {len(fair.candidates(variant)) for variant in fair.variants} == {8}
    assert {dataset.protocol for dataset in fair.datasets} == {"val"}
    assert {dataset.protocol for dataset in paper.datasets} == {"trainval"}
    for variant in paper.variants:
        (candidate,) = paper.candidates(variant)
        assert candidate.values["lr"] == 5e-4
        training = vars(paper.training_of(variant))
        assert training | {
            "epochs": 300, "batch_size": 32, "weight_decay": 0.05, "warmup_epochs": 10, "min_lr": 1e-6 / 5e-4,
            "clip_grad": 10, "optimizer": "adamw", "cloud_augment": "scale+shift",
        } == training  # fmt: skip


def test_inputs_are_the_papers():
    for name, points, groups, pool in (("scanobjectnn", 2048, 128, 2400), ("modelnet40", 1024, 64, 1200)):
        (backbone,) = study_of(f"{name}-published").backbones
        assert backbone.model == "points/point-mae"
        wanted = {"num_points": points, "num_groups": groups, "group_size": 32, "drop_path": 0.1}
        assert dict(backbone.options) | wanted == dict(backbone.options)
        assert pool_size(points) == pool
    assert study_of("scanobjectnn").backbones[0].options["normalize"] == "none"
    assert [dataset.format for dataset in study_of("scanobjectnn").datasets] == [
        f"scanobjectnn/{which}" for which in ("bg", "only", "hardest")
    ]


def test_published_numbers():
    table, figure, readme = study_of("scanobjectnn").published
    found = {(score.label, score.column): score.percent for score in table.scores}
    assert found["Full", "hardest"] == 85.18
    assert found["DAPT", "bg"] == 90.88
    assert table.not_run == {"PointGST"}
    assert figure.not_run == readme.not_run == set()
    assert {score.label: score.percent for score in figure.scores} == {
        "Full": 88.31, "DAPT": 87.13, "Adapter-X (DAPT-X)": 88.45
    }  # fmt: skip
    assert {score.column: score.percent for score in readme.scores} == {"bg": 93.63, "only": 93.12, "hardest": 88.51}
    (modelnet,) = study_of("modelnet40").published
    assert modelnet.metrics("modelnet40") == ["plain", "voted"]
    assert {score.percent for score in modelnet.scores if score.label == "IDPT"} == {93.3, 94.4}


@pytest.mark.parametrize("name", ["scanobjectnn", "scanobjectnn-published"])
def test_peers_have_the_published_sizes(name):
    for variant in study_of(name).variants:
        if variant.label in PEERS:
            with torch.device("meta"):
                model = PointTransformer(15)
            dl.attach(model, list(variant.methods))
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            assert trained == PEERS[variant.label], variant.label


def test_a_recipe_is_carried_out(tmp_path, monkeypatch):
    root = write_modelnet(tmp_path)
    write_cache(root, "train", 12, 70)
    write_cache(root, "test", 6, 70)
    use_tiny_points(monkeypatch)
    small = tmp_path / "small.yaml"
    small.write_text(
        f"base: {STUDIES['points/modelnet40-published']}\n"
        f"backbones: [{{label: Point-MAE, model: {TINY}, options: {{num_points: 48}}}}]\n"
        "seeds: [0]\ntraining: {epochs: 1, batch_size: 6, warmup_epochs: 0}\n"
    )
    output = tmp_path / "out"
    words = ["--data", str(root), "--output", str(output), "--only", "LoRA", "--only", "Point-PEFT"]
    assert main(["compare", str(small), *words]) == 0
    results = [json.loads(file.read_text()) for file in output.rglob("results.json")]
    assert len(results) == 2
    assert {(each["data"]["train"], each["data"]["test"]) for each in results} == {(12, 6)}
    table = Path(output / "table.md").read_text()
    assert "93.8" in table
