"""The runner on batches that are lists: detectors from fit to from_pretrained, segmentation's two kinds of batch."""

import csv
import json
import math

import pytest
import timm
import torch
from detectors import NAMES, SMALL, Rectangles, small_detector
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from torchmetrics import MeanMetric, MetricCollection

import deltalens as dl
from deltalens.data import Splits, scenes
from deltalens.data.dense_transforms import DenseAugmentation
from deltalens.data.inputs import Augmentation, set_inputs
from deltalens.tasks import DetectionTask, task_class
from deltalens.training import TrainingSettings, fit
from deltalens.training.feature_cache import FeaturesCannotBeKept
from deltalens.training.loaders import collate_of, evaluation_loader, preparation_loader, training_loader

SWIN = "swin_tiny_patch4_window7_224"
SIZES = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
QUIET = {"progress": False, "batch_size": 4, "warmup_epochs": 0}
BACKBONE = "backbone.pyramid.backbone"


def splits(count=16, **origin):
    return Splits(Rectangles(count), Rectangles(4, 1), NAMES, Rectangles(4, 2), origin, "detection")


def test_from_fit_to_from_pretrained(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model(SWIN, num_classes=0, **SIZES).state_dict(), tmp_path / "swin.safetensors")
    options = {**SMALL["retinanet"], "group_norm": True, "channels": 32, "score_threshold": 0.0}
    model = dl.create_backbone(
        SWIN, num_classes=3, checkpoint=tmp_path / "swin.safetensors", head="retinanet", head_options=options, **SIZES
    )
    task = DetectionTask(dl.attach(model, dl.MonaConfig(bottleneck=4)), NAMES, metrics="voc07")
    settings = TrainingSettings(epochs=3, lr=1e-2, **QUIET)
    results = fit(task, splits(metrics="voc07"), settings, tmp_path / "run")
    rows = results["history"]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert {"train_classification", "train_bbox_regression", "val_map", "val_map50_voc07"} <= set(rows[-1])
    assert "val_loss" not in rows[-1]
    assert {"map", "map50", "map75", "map50_voc07", "map50_voc"} <= set(results["test"])
    assert "loss" not in results["test"]
    assert not task.training
    assert results["parameters"]["head"] > 0
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"] == results["test"]
    again = dl.from_pretrained(tmp_path / "run")
    info = dl.adapter_info(again)
    assert (info["task"], info["class_names"], info["split"]["metrics"]) == ("detection", NAMES, "voc07")
    images, _ = Rectangles(3, 5, sizes=((64, 64), (48, 70))).batch()
    with torch.no_grad():
        for one, other in zip(task.model(images), again(images), strict=True):
            assert len(one["boxes"])
            assert all(torch.equal(one[name], other[name]) for name in one)
    found = DetectionTask(again, info["class_names"]).eval().decode(again(images), threshold=0.0, topk=2)
    assert all(len(each) == 2 and each[0].name in NAMES for each in found)


def small_task(config):
    return DetectionTask(dl.attach(small_detector("retinanet"), config, backbone=BACKBONE), NAMES)


def test_data_without_any_object_train():
    data = Splits(Rectangles(4, empty=True), Rectangles(2, empty=True), NAMES, task="detection")
    results = fit(small_task(dl.MonaConfig(bottleneck=4)), data, TrainingSettings(epochs=1, **QUIET))
    assert math.isfinite(results["history"][0]["train_loss"])
    assert math.isnan(results["val"]["map"])


def test_methods_that_prepare_see_lists_of_images():
    task = small_task(dl.SCTConfig(num_channels=4))
    data = Splits(Rectangles(8, sizes=((64, 64), (48, 64))), None, NAMES, task="detection")
    fit(task, data, TrainingSettings(epochs=1, **QUIET))
    layers = [module for module in task.modules() if type(module).__name__ == "SCTLayer"]
    assert layers
    assert all(layer.look() is not None for layer in layers)


def test_features_of_lists_are_not_kept(tmp_path):
    with pytest.raises(FeaturesCannotBeKept, match="images of several sizes"):
        fit(small_task(dl.LinearConfig()), splits(), TrainingSettings(epochs=1, **QUIET), cache_features=tmp_path)


@pytest.mark.parametrize(("name", "head"), [("detection", "fcos"), ("instance", "mask_rcnn")])
def test_scenes_as_the_readers_give_them(name, head, monkeypatch):
    """Targets on tv_tensors, resized pictures, the transforms of training and of the test."""
    monkeypatch.setattr(scenes, "VAL_SCENES", 2)
    monkeypatch.setattr(scenes, "TEST_SCENES", 2)
    data = scenes.make_scenes(4, 96, 0, name)
    preprocessing = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "test_size": (64, 64)}
    set_inputs(data.train, preprocessing, Augmentation(dense=DenseAugmentation(short_sides=(48, 64), long_side=80)))
    for part in (data.val, data.test):
        set_inputs(part, preprocessing)
    model = small_detector(head, len(data.class_names), score_threshold=0.0)
    task = task_class(data.task)(dl.attach(model, dl.BitFitConfig()), data.class_names)
    results = fit(task, data, TrainingSettings(epochs=1, lr=1e-3, **QUIET))
    assert math.isfinite(results["history"][0]["train_loss"])
    assert 0 <= results["test"][task.main_metric] <= 1
    images, targets = collate_of(data.val)([data.val[0], data.val[1]])
    assert images[0].shape == (3, 64, 64)
    assert targets[0]["orig_size"].tolist() == [96, 96]


# ------------------------------------------------------------------ loaders
def test_a_datasets_own_collate_is_used():
    data = Rectangles(4)
    for whole in (data, Subset(data, [0, 1]), ConcatDataset([data, data]), data + data):
        assert collate_of(whole) is Rectangles.collate
        for loader in (training_loader(whole, 2, 0), evaluation_loader(whole, 2), preparation_loader(whole, 2, 0)):
            images, targets = next(iter(loader))
            assert isinstance(images, list)
            assert len(images) == len(targets) == 2
    assert collate_of([1, 2]) is None
    images, _ = next(iter(preparation_loader(data, 2, 0)))
    assert [image.dtype for image in images.to(torch.float64)] == [torch.float64] * 2


class Crops(Rectangles):
    """Segmentation's batches: one tensor of training crops, lists in evaluation."""

    def __init__(self, count, whole):
        super().__init__(count, sizes=((64, 64), (48, 80)) if whole else ((64, 64),))
        self.whole = whole

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        return image, (image[0] > 0.5).long()

    def collate(self, items):
        images, masks = zip(*items, strict=True)
        return (list(images), list(masks)) if self.whole else (torch.stack(images), torch.stack(masks))


class PixelTask(nn.Module):
    """A pixelwise classifier with a loss in evaluation, too."""

    name, main_metric = "pixels", "accuracy"

    def __init__(self):
        super().__init__()
        self.model, self.class_names = nn.Conv2d(3, 2, 1), ["no", "yes"]

    def forward(self, batch):
        images, masks = batch
        pairs = [(images, masks)] if self.training else [(i[None], m[None]) for i, m in zip(images, masks, strict=True)]
        output = [self.model(image) for image, _ in pairs]
        losses = [nn.functional.cross_entropy(o, m) for o, (_, m) in zip(output, pairs, strict=True)]
        return {"loss": sum(losses) / len(losses), "output": output, "losses": {}, "terms": {}}

    def new_metrics(self):
        return MetricCollection({"accuracy": MeanMetric()})

    def update_metrics(self, metrics, result, batch):
        for output, mask in zip(result["output"], batch[1], strict=True):
            metrics.update((output[0].argmax(0) == mask).float().mean())


def test_stacked_training_batches_and_lists_in_evaluation():
    data = Splits(Crops(8, False), Crops(4, True), ["no", "yes"])
    results = fit(PixelTask(), data, TrainingSettings(epochs=12, lr=0.5, **QUIET))
    assert results["val"]["accuracy"] > 0.8
    assert math.isfinite(results["val"]["loss"])
    assert "val_loss" in results["history"][0]
