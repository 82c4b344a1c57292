"""Every detection head overfits a few scenes, and narrow ones begin as wide ones do."""

import pytest
import torch
from detectors import NAMES, WITH_MASKS, Rectangles, small_detector

from deltalens.backbones.dense.retinanet import _Head
from deltalens.tasks import DetectionTask, InstanceTask

STEPS, RATE = 120, 3e-3


@pytest.mark.parametrize(
    "head", ["retinanet", *(pytest.param(head, marks=pytest.mark.slow) for head in ("fcos", *WITH_MASKS))]
)
def test_every_head_learns_rectangles(head):
    """Boxes, and masks, with their classes, of the scenes that it is trained on."""
    task = (InstanceTask if head in WITH_MASKS else DetectionTask)(small_detector(head), NAMES)
    optimizer, batch = torch.optim.AdamW(task.parameters(), lr=RATE, weight_decay=0.0), Rectangles(3).batch()
    task.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (1 - step / STEPS))
        optimizer.zero_grad()
        task(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 5.0)
        optimizer.step()
    metrics = task.eval().new_metrics()
    with torch.no_grad():
        task.update_metrics(metrics, task(batch), batch)
    values = metrics.compute()
    assert values["map50"] > 0.8
    assert head not in WITH_MASKS or values["mask_map50"] > 0.8


def test_narrow_heads_of_retinanet_begin_with_signals_of_the_published_size():
    spread = {}
    for channels in (16, 64, 256):
        torch.manual_seed(0)
        head = _Head(channels, 1, 8, None).double()
        logits = head.classification_head([torch.randn(2, channels, 12, 12).double()])
        changes = head.regression_head([torch.randn(2, channels, 12, 12).double()])
        spread[channels] = float(logits.detach().std()), float(changes.detach().std())
    for channels in (16, 64):
        for narrow, wide in zip(spread[channels], spread[256], strict=True):
            assert 0.2 < narrow / wide < 5  # 1e-3 with 0.01 for all widths
