"""The recipes of dense tasks: settings of the papers' code, their published numbers, and the sizes of every row."""

import pytest
import torch

import deltalens as dl
from deltalens.backbones.dense.cascade_rcnn import CascadeOptions
from deltalens.studies.recipe_files import recipe_files
from deltalens.studies.study_reader import read_study

STUDIES = recipe_files("compare")
SWIN_L = {  # the reference's table, with the output norms of a detector trained by some of the official rows
    "Fixed": 0,
    "Partial-1": 28_339_632,
    "Adapter": 4_659_456,
    "LoRA": 4_620_288,
    "AdaptFormer": 2_329_728,
    "Mona": 5_267_712,
}


def study_of(name):
    return read_study(STUDIES[name], {"": "nowhere"})


def counted(study, *labels):
    """Label -> count of parameters, of the recipe's network without memory."""
    entry = study.backbones[0]
    found = {}
    with torch.device("meta"):
        name = entry.model.removeprefix("timm/").partition(".")[0]
        network = dl.create_backbone(
            f"timm/{name}", num_classes=150, pretrained=False, img_size=entry.img_size or 224, **entry.options
        )
        for label in labels:
            row = next(variant for variant in study.variants if variant.label == label)
            dl.attach(network, list(row.methods))
            found[label] = dl.count_parameters(network)
            dl.detach(network)
    return found


@pytest.mark.parametrize("name", ["mona/voc0712", "mona/ade20k", "mona/coco", "vpt/ade20k"])
def test_two_protocols_of_one_comparison(name):
    fair, paper = study_of(name), study_of(f"{name}-published")
    assert [row.to_dict() for row in fair.variants] == [row.to_dict() for row in paper.variants]
    assert fair.published == paper.published
    assert (fair.task, fair.backbones[0].options["head"]) == (paper.task, paper.backbones[0].options["head"])
    assert fair.training.dense == paper.training.dense
    assert not [variant.label for variant in fair.variants if variant.own_fields]


def test_monas_ade20k_is_that_of_its_code():
    study = study_of("mona/ade20k-published")
    assert study.backbones[0].model == "timm/swin_large_patch4_window7_224.ms_in22k"
    assert (study.task, study.backbones[0].options["head"]) == ("segmentation", "upernet")
    for row in study.variants:
        mona = row.label == "Mona"
        (candidate,) = study.candidates(row)
        assert candidate.values["lr"] == (3e-4 if mona else 6e-5)
        options = {**study.backbones[0].options, **row.backbone}
        assert options["drop_path_rate"] == (0.2 if mona else 0.3)
    training = study.training
    assert (training.weight_decay, training.batch_size) == (0.01, 16)
    assert training.epochs * 20_210 / 16 == pytest.approx(160_000, rel=0.005)
    assert training.warmup_epochs * 20_210 / 16 == pytest.approx(1500, rel=0.005)
    assert (training.decay, training.min_lr) == ("linear", 0)
    dense = training.augmentation.dense
    assert (dense.crop_size, dense.short_side, dense.long_side, dense.scale) == (512, 512, 2048, (0.5, 2.0))


def test_monas_voc_is_that_of_its_code():
    study = study_of("mona/voc0712-published")
    assert (study.task, study.backbones[0].options["head"]) == ("detection", "retinanet")
    assert study.backbones[0].options["drop_path_rate"] == 0.2
    assert {study.candidates(row)[0].values["lr"] for row in study.variants} == {1e-4}
    assert (study.training.epochs, study.training.batch_size, study.training.weight_decay) == (12, 2, 0.05)
    assert (study.training.decay, study.training.decay_at, study.training.warmup_epochs) == ("steps", (9,), 0)
    assert study.training.dense["test_size"] == (600, 1000)
    assert study.datasets[0].protocol == "trainval"


def test_monas_coco_is_that_of_its_code():
    study = study_of("mona/coco-published")
    assert study.backbones[0].model == "timm/swin_base_patch4_window7_224.ms_in22k"
    options = study.backbones[0].options
    assert (study.task, options["head"], options["drop_path_rate"]) == ("instance", "cascade", 0.3)
    head = CascadeOptions(**options["head_options"])
    assert (head.box_head, head.box_norm, head.box_loss, head.box_loss_weight) == ("4conv1fc", "batch", "giou", 10)
    assert (head.iou_thresholds, head.stage_weights, head.class_agnostic) == ((0.5, 0.6, 0.7), (1, 0.5, 0.25), True)
    assert {study.candidates(row)[0].values["lr"] for row in study.variants} == {1e-4}
    training = study.training
    assert (training.epochs, training.batch_size, training.weight_decay) == (36, 16, 0.05)
    assert (training.decay, training.decay_at) == ("steps", (27, 33))
    images = 117_266  # of train2017 that have objects
    assert training.warmup_epochs * images / 16 == pytest.approx(500, rel=0.005)
    assert training.dense["test_size"] == (800, 1333)
    dense = training.augmentation.dense
    assert (dense.short_sides, dense.long_side) == (tuple(range(480, 801, 32)), 1333)
    assert (dense.random_crop, dense.crop_short_sides, dense.crop_range) == (True, (400, 500, 600), (384, 600))
    assert study.datasets[0].protocol == "trainval"


@pytest.mark.slow
def test_rows_of_mona_have_the_papers_sizes():
    found = counted(study_of("mona/ade20k"), *SWIN_L)
    assert {label: count.adapter for label, count in found.items()} == SWIN_L


def test_rows_of_vpt_have_the_papers_sizes():
    """In millions, as its Table 3 prints them; the head has 13.14 here and 13.18 there."""
    found = counted(study_of("vpt/ade20k"), "Head only", "VPT-deep", "VPT-deep + Bias", "Bias")
    head = found["Head only"].head
    assert head == 13_143_640
    assert found["VPT-deep"].adapter == 24 * 10 * 1024
    printed = {"Head only": 13.18, "VPT-deep": 13.43, "VPT-deep + Bias": 15.79, "Bias": 13.46}
    for label, count in found.items():
        assert (count.adapter + count.head) / 1e6 == pytest.approx(printed[label], abs=0.1), label


def test_monas_star_is_that_of_its_code():
    study = study_of("mona/star-published")
    assert (study.task, study.backbones[0].options["head"]) == ("oriented", "oriented_rcnn")
    assert {study.candidates(row)[0].values["lr"] for row in study.variants} == {1e-4}
    for row in study.variants:
        options = {**study.backbones[0].options, **row.backbone}
        assert options["drop_path_rate"] == (0.3 if row.label == "Full" else 0.2)
    training = study.training
    assert (training.epochs, training.batch_size, training.weight_decay, training.clip_grad) == (12, 2, 0.05, 35)
    assert (training.decay, training.decay_at) == ("steps", (8, 11))
    assert training.augmentation.dense.flips == (0.25, 0.25, 0.25)
    assert training.dense["test_size"] == (1024, 1024)
    assert study.datasets[0].protocol == "val"


@pytest.mark.parametrize(
    ("name", "head", "lr"),
    [("dota", "h2rbox_v2", 5e-5), ("star-h2rbox", "h2rbox_v2", 1e-4), ("star-kld", "oriented_retinanet", 1e-4)],
)
def test_monas_other_oriented_studies(name, head, lr):
    study = study_of(f"mona/{name}-published")
    assert (study.task, study.backbones[0].options["head"]) == ("oriented", head)
    assert {study.candidates(row)[0].values["lr"] for row in study.variants} == {lr}
    assert {study.backbones[0].options["drop_path_rate"]} == {0.2}
    assert (study.training.decay_at, study.training.clip_grad) == ((8, 11), 35)
    spared = ("absolute_pos_embed", "relative_position_bias_table", "norm") if name == "star-kld" else ()
    assert study.training.no_decay == spared  # () decays all, None only matrices
    with torch.device("meta"):
        options = study.backbones[0].options
        dense_options = {"head": head, "head_options": options["head_options"]}
        dl.create_backbone("swin_base_patch4_window7_224", num_classes=15, pretrained=False, **dense_options)


@pytest.mark.parametrize("name", ["mona/dota", "mona/star"])
def test_fair_studies_of_oriented_boxes(name):
    study = study_of(name)
    assert (study.task, study.protocol, study.training.epochs) == ("oriented", "fair", 12)
    assert study.backbones[0].model == "timm/swin_base_patch4_window7_224.ms_in22k"
    assert len(study.variants) == 11
