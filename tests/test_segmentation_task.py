"""Segmentation: losses and ignored pixels, metrics against hand-made cases, whole images, windows and views."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltalens.tasks import Inference, SegmentationTask, main_metric_of, task_class
from deltalens.tasks.pixel_metrics import PixelConfusion
from deltalens.tasks.segmentation import cross_entropy
from deltalens.tasks.segmentation_inference import by_windows, segment

NAMES = ["sky", "road", "car"]


class Pointwise(nn.Module):
    """A 1x1 convolution as network; sizes: of the images that it has seen."""

    num_classes = 3

    def __init__(self, auxiliary=1):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.auxiliary, self.sizes = nn.Conv2d(3, 3, 1), auxiliary, []

    def forward(self, images):
        self.sizes.append(tuple(images.shape))
        found = {"out": self.layer(images)}
        if self.training and self.auxiliary:
            aux = self.layer(images) * 2
            found["aux"] = aux if self.auxiliary == 1 else [aux] * self.auxiliary
        return found


def pictures(*sizes):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    masks = [torch.randint(0, 3, size, generator=generator) for size in sizes]
    return images, masks


def test_metrics_of_a_hand_made_case():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    found = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 2]])
    metric = PixelConfusion(4)
    metric.update(found[:1], truth[:1])
    metric.update(found[1:], truth[1:])
    assert metric.confusion().tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = metric.iou().tolist()
    assert iou[:2] == pytest.approx([2 / 3, 2 / 4])
    assert math.isnan(iou[2])  # found, and not there
    assert math.isnan(iou[3])
    assert metric.accuracy().tolist()[:2] == pytest.approx([2 / 3, 2 / 3])
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx({"miou": (2 / 3 + 1 / 2) / 2, "mean_accuracy": 2 / 3, "pixel_accuracy": 4 / 6})


def test_metrics_of_nothing_but_ignored_pixels():
    metric = PixelConfusion(2)
    metric.update(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert all(math.isnan(float(value)) for value in metric.compute().values())
    with pytest.raises(ValueError, match=r"map of \(2, 2\) pixels was measured by a mask of \(2, 3\)"):
        metric.update(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("auxiliary", [0, 1, 2])
def test_the_loss_is_cross_entropy_with_the_auxiliary_heads_share(auxiliary):
    images, masks = pictures((5, 6), (5, 6))
    masks[0][:2] = 255
    task = SegmentationTask(Pointwise(auxiliary), NAMES).train()
    result = task((torch.stack(images), torch.stack(masks)))
    logits = task.model.layer(torch.stack(images))
    main = F.cross_entropy(logits, torch.stack(masks), ignore_index=255)
    further = F.cross_entropy(2 * logits, torch.stack(masks), ignore_index=255)
    assert result["loss"].item() == pytest.approx((main + 0.4 * auxiliary * further).item(), rel=1e-5)
    assert set(result["losses"]) == {"cross_entropy"} | ({"auxiliary"} if auxiliary else set())
    assert task(([*images], [*masks]))["loss"].item() == pytest.approx(result["loss"].item())


def test_padding_of_different_sizes_does_not_count():
    images, masks = pictures((4, 6), (7, 3))
    task = SegmentationTask(Pointwise(0), NAMES).train()
    logits = [task.model.layer(image).flatten(1).T for image in images]
    expected = F.cross_entropy(torch.cat(logits), torch.cat([mask.flatten() for mask in masks]))
    assert task((images, masks))["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_of_ignored_pixels_has_no_loss_and_deterministic_algorithms_change_nothing():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    masks = torch.full((2, 4, 5), 255)
    assert cross_entropy(logits, masks).item() == 0
    masks[0, 0] = 1
    usual = cross_entropy(logits, masks)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.allclose(cross_entropy(logits, masks), usual)
    finally:
        torch.use_deterministic_algorithms(False)


def test_evaluation_is_in_the_sizes_of_the_masks():
    images, _ = pictures((4, 6), (8, 8), (4, 6))
    _, masks = pictures((8, 12), (8, 8), (4, 6))
    task = SegmentationTask(Pointwise(), NAMES).eval()
    with torch.no_grad():
        result = task((images, masks))
    assert [tuple(logits.shape) for logits in result["output"]] == [(3, 8, 12), (3, 8, 8), (3, 4, 6)]
    single = [task(([image], [mask]))["loss"].item() for image, mask in zip(images, masks, strict=True)]
    assert result["loss"].item() == pytest.approx(sum(single) / 3, rel=1e-5)
    metrics = task.new_metrics()
    task.update_metrics(metrics, result, (images, masks))
    found = torch.cat([logits.argmax(0).flatten() for logits in result["output"]])
    right = (found == torch.cat([mask.flatten() for mask in masks])).float().mean()
    assert float(metrics.compute()["pixel_accuracy"]) == pytest.approx(right.item())
    assert set(task.per_class(metrics)) == set(NAMES)


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((9, 14), 5, 3), ((5, 7), 8, 4), ((6, 6), 3, 3), ((11, 4), 4, 1)]
)
def test_windows_of_a_pointwise_network_are_the_whole_image(size, window, stride):
    model = Pointwise().eval()
    images = torch.stack(pictures(size, size)[0])
    with torch.no_grad():
        assert torch.allclose(by_windows(model, images, window, stride), model(images)["out"], atol=1e-6)
    assert all(shape[-2] <= window and shape[-1] <= window for shape in model.sizes[:-1])


def test_overlapping_windows_are_averaged():
    class Constant(nn.Module):
        def forward(self, images):
            mean = images.mean((1, 2, 3), keepdim=True)
            return {"out": mean.expand(-1, 2, *images.shape[-2:])}

    images = torch.arange(6.0).expand(1, 3, 4, 6)
    found = by_windows(Constant(), images, 4, 2)
    assert found[0, 0, 0].tolist() == pytest.approx([1.5, 1.5, 2.5, 2.5, 3.5, 3.5])


def test_views_are_averaged_as_probabilities():
    images, _ = pictures((6, 8))
    model = Pointwise().eval()
    how = Inference(scales=(0.5, 1.0), flip=True)
    with torch.no_grad():
        (found,) = segment(model, images, [(6, 8)], how)
        views = []
        for scale in (0.5, 1.0):
            size = (round(6 * scale), round(8 * scale))
            seen = F.interpolate(images[0][None], size, mode="bilinear") if scale != 1 else images[0][None]
            for flip in (False, True):
                logits = model(seen.flip(-1) if flip else seen)["out"]
                logits = logits.flip(-1) if flip else logits
                views.append(F.interpolate(logits, (6, 8), mode="bilinear").softmax(1))
    assert torch.allclose(found.softmax(0), sum(views)[0] / 4, atol=1e-6)


def test_decoding_names_the_classes_that_are_there():
    logits = torch.zeros(3, 2, 4)
    logits[2, 0] = 1
    logits[1, 1, 0] = 1
    (found,) = SegmentationTask(Pointwise(), NAMES).decode([logits])
    assert found.mask.tolist() == [[2, 2, 2, 2], [1, 0, 0, 0]]
    assert found.shares == (("car", 0.5), ("sky", 0.375), ("road", 0.125))


def test_what_is_wrong_is_named():
    images, masks = pictures((4, 4))
    masks[0][1, 1] = 7
    task = SegmentationTask(Pointwise(), NAMES)
    for mode in (task.train(), task.eval()):
        with pytest.raises(ValueError, match="value 7 names no class: there are 3, counted from 0, and 255"):
            mode((images, masks))
    with pytest.raises(ValueError, match="1 images and 0 masks"):
        task((images, []))
    with pytest.raises(ValueError, match="segments 3 classes and the data have 2; pass num_classes=2"):
        SegmentationTask(Pointwise(), NAMES[:2])
    with pytest.raises(ValueError, match="between 1 and the window's edge, 4, so that no pixel is left out, got 5"):
        Inference(window=4, stride=5)
    with pytest.raises(ValueError, match="a stride of 5 needs a window"):
        Inference(stride=5)
    with pytest.raises(ValueError, match="factors above 0"):
        Inference(scales=(0.5, 0.0))
    assert task_class("segmentation") is SegmentationTask
    assert main_metric_of("segmentation", {}) == "miou"
