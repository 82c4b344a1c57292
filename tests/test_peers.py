"""MMA and the methods it is measured against: sizes on ViT-B/16, and published settings as parts of studies."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from clip_checks import vit_b16

import deltalens as dl
from deltalens.methods import CoOpConfig, MaPLeConfig, MMAConfig, ProGradConfig, TipAdapterConfig
from deltalens.studies.study_reader import read_study

PARTS = Path(str(files("deltalens.studies") / "recipes/mma"))
ELEVEN = ["imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"]
ELEVEN += ["sun397", "dtd", "eurosat", "ucf101"]
PEERS = {
    "CoOp": 2_048, "CoCoOp": 35_360, "KgCoOp": 2_048, "ProGrad": 8_192, "MaPLe": 3_555_072, "RPO": 30_720,
    "LASP": 39_424, "MMA": 674_560,
}  # fmt: skip
FEW_SHOT = {"CoOp": 8_192, "CLIP-Adapter": 131_072, "Tip-Adapter": 0, "Tip-Adapter-F": 0, "CLIP-LoRA": 184_320}


def study_of(folder, *parts):
    """A study of CoOp's data sets that builds on parts of the package."""
    content = {
        "base": [str(PARTS / f"{part}.yaml") for part in parts],
        "protocol": "published",
        "backbones": [{"model": "open_clip/ViT-B-16/openai", "label": "ViT-B/16"}],
        "datasets": dict.fromkeys(ELEVEN, "here"),
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return read_study(folder / "study.yaml")


def counted(study):
    model, found = vit_b16(), {}
    for variant in study.variants:
        dl.attach(model, list(variant.methods))
        found[variant.label] = dl.count_parameters(model).adapter
        dl.detach(model)
    return found


def settings_of(study, label, dataset="dtd"):
    """(methods, learning rate, training) of a row on a data set."""
    row = next(variant for variant in study.variants if variant.label == label).on(dataset)
    assert row.own_search
    assert row.search is None
    (candidate,) = study.candidates(row)
    return row.methods, candidate.values["lr"], study.training_of(row)


def test_sizes_from_base_to_novel_classes(tmp_path):
    study = study_of(tmp_path, "_peers", "_peers-by-dataset")
    assert counted(study) == PEERS
    for label in PEERS:
        training = settings_of(study, label)[2]
        assert (training.optimizer, training.weight_decay, training.no_decay) == ("sgd", 5e-4, ())
        assert (training.schedule, training.warmup_lr, training.min_crop) == ("epoch", 1e-5, 0.08)


# row, data set -> rate, batch, epochs, warm-up
BASE_TO_NOVEL = {
    ("CoOp", "dtd"): (0.002, 32, 200, 1),
    ("CoOp", "imagenet"): (0.002, 32, 50, 1),
    ("CoCoOp", "dtd"): (0.002, 1, 10, 1),
    ("KgCoOp", "dtd"): (0.002, 128, 100, 1),
    ("ProGrad", "dtd"): (0.002, 32, 100, 1),
    ("MaPLe", "dtd"): (0.0035, 4, 5, 1),
    ("RPO", "dtd"): (0.01, 4, 15, 1),
    ("RPO", "imagenet"): (0.005, 4, 10, 1),
    ("LASP", "oxford_pets"): (0.032, 32, 25, 3),
    ("LASP", "dtd"): (0.032, 32, 50, 5),
    ("LASP", "eurosat"): (0.032, 32, 300, 7),
    ("LASP", "food101"): (0.002, 1, 10, 1),
    ("MMA", "dtd"): (0.0015, 16, 5, 0),
    ("MMA", "imagenet"): (0.0015, 128, 5, 0),
}


def test_settings_from_base_to_novel_classes(tmp_path):
    study = study_of(tmp_path, "_peers", "_peers-by-dataset")
    for (label, dataset), wanted in BASE_TO_NOVEL.items():
        _, lr, training = settings_of(study, label, dataset)
        assert (lr, training.batch_size, training.epochs, training.warmup_epochs) == wanted, (label, dataset)
    weights = [settings_of(study, "LASP", name)[0][0].weight for name in ("dtd", "caltech101", "ucf101", "eurosat")]
    assert weights == [10, 10, 10, 5]
    assert settings_of(study, "LASP")[2].clip_grad == 1


def test_across_data_sets(tmp_path):
    study = study_of(tmp_path, "_peers", "_peers-cross")
    found = counted(study)
    assert {label: found[label] for label in ("MMA", "MaPLe")} == {"MMA": 337_280, "MaPLe": 1_185_024}
    assert settings_of(study, "MMA")[1:][0] == 0.0015
    assert [settings_of(study, label)[2].epochs for label in ("CoOp", "RPO", "MaPLe", "MMA")] == [50, 10, 2, 1]
    assert study.variants[-1].methods == (MMAConfig.cross_dataset(),)


def test_few_shots(tmp_path):
    study = study_of(tmp_path, "_few-shot", "_few-shot-by-dataset")
    assert counted(study) == FEW_SHOT
    _, lr, training = settings_of(study, "Tip-Adapter-F", "eurosat")
    assert (lr, training.epochs, training.eps, training.schedule, training.warmup_epochs) == (
        1e-3,
        100,
        1e-4,
        "step",
        0,
    )
    for label in ("Tip-Adapter", "Tip-Adapter-F"):
        ((method,), _, training) = settings_of(study, label, "stanford_cars")
        assert (method.highest_alpha, method.highest_beta) == (10, 20)
        assert (method.search, method.passes, training.min_crop, training.hflip) == (True, 10, 0.5, 0.5)
    assert settings_of(study, "Tip-Adapter", "imagenet")[0][0] == TipAdapterConfig()
    for dataset, classes in {"eurosat": 10, "dtd": 47, "ucf101": 101, "imagenet": 1000}.items():
        epochs = settings_of(study, "CLIP-LoRA", dataset)[2].epochs
        assert epochs * (16 * classes // 32) == pytest.approx(500 * 16, rel=0.01)
    _, lr, training = settings_of(study, "CLIP-LoRA")
    assert (lr * training.min_lr, training.weight_decay) == (pytest.approx(1e-6), 0.01)
    assert settings_of(study, "CLIP-LoRA")[0] == (dl.LoRAConfig.clip(),)


def test_presets():
    model = vit_b16()
    for config, count in {
        CoOpConfig(): 8_192,
        CoOpConfig.base_to_novel(): 2_048,
        ProGradConfig.base_to_novel(): 2_048,
        MMAConfig.cross_dataset(): 337_280,
        MaPLeConfig.cross_dataset(): 1_185_024,
    }.items():
        dl.attach(model, config)
        assert dl.count_parameters(model).adapter == count, config
        dl.detach(model)
    dl.attach(model, TipAdapterConfig(train_keys=True))
    model.live("logits")[0].make_room("keys", 1000 * 16)
    assert dl.count_parameters(model).adapter == 8_192_000
    assert isinstance(ProGradConfig.base_to_novel(), ProGradConfig)
