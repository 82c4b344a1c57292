"""NMS of oriented boxes is the greedy rule, and torchvision's for upright boxes."""

import pytest
import torch
from oriented_scenes import some_boxes
from torchvision.ops import nms

from deltalens.models import oriented_nms as module
from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import oriented_iou
from deltalens.models.oriented_nms import batched_oriented_nms, oriented_nms


def greedy(boxes, scores, labels, threshold):
    """The rule as it is stated, box by box."""
    suppresses = ((oriented_iou(boxes, boxes) > threshold) & (labels[:, None] == labels)).tolist()
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not any(suppresses[k][i] for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("first_block", [5, 64])
@pytest.mark.parametrize("extent", [20.0, 100.0, 600.0])
def test_kept_is_what_the_greedy_rule_keeps(extent, first_block, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_BLOCK", first_block)
    made = torch.Generator().manual_seed(int(extent))
    boxes = some_boxes(150, extent=extent, seed=int(extent))
    boxes[100:120] = boxes[:20]  # the same ones again
    scores = (torch.rand(150, generator=made) * 20).round()  # ties
    labels = torch.randint(3, (150,), generator=made)
    for threshold in (0.0, 0.3, 1.0):
        want = greedy(boxes, scores, 0 * labels, threshold)
        assert oriented_nms(boxes, scores, threshold).tolist() == want
        want = greedy(boxes, scores, labels, threshold)
        assert batched_oriented_nms(boxes, scores, labels, threshold).tolist() == want


def test_a_chain_of_boxes_keeps_every_second_one():
    """Each overlaps the next one only, so that no box is decided before the one before it."""
    boxes = torch.tensor([[6.0 * i, 0.0, 10.0, 10.0, 0.3] for i in range(300)])
    kept = oriented_nms(boxes, torch.arange(300, 0, -1.0), 0.1)
    assert kept.tolist() == list(range(0, 300, 2))


def test_upright_boxes_are_torchvisions():
    boxes, scores = some_boxes(500, extent=200), torch.rand(500, generator=torch.Generator().manual_seed(0))
    boxes[:, 4] = 0
    assert oriented_nms(boxes, scores, 0.4).tolist() == nms(enclosing(boxes), scores, 0.4).tolist()


def test_no_boxes_and_one():
    assert oriented_nms(torch.zeros(0, 5), torch.zeros(0), 0.5).tolist() == []
    assert oriented_nms(torch.zeros(0, 5), torch.zeros(0), 0.5).dtype == torch.long
    assert oriented_nms(torch.ones(1, 5), torch.ones(1), 0.5).tolist() == [0]
    assert len(oriented_nms(torch.zeros(3, 5), torch.zeros(3), 0.5)) == 3  # boxes without area suppress nothing


def test_what_is_not_finite_suppresses_nothing():
    box = torch.tensor([10.0, 10.0, 8.0, 4.0, 0.3])
    boxes = box.repeat(5, 1)
    boxes[1, 0], boxes[2, 2] = torch.nan, torch.inf
    assert oriented_nms(boxes, torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]), 0.5).tolist() == [1, 2, 3]


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="threshold"):
        oriented_nms(torch.zeros(1, 5), torch.zeros(1), 1.5)
    with pytest.raises(ValueError, match="scores"):
        oriented_nms(torch.zeros(2, 5), torch.zeros(1), 0.5)
    with pytest.raises(ValueError, match="labels"):
        batched_oriented_nms(torch.zeros(2, 5), torch.zeros(2), torch.zeros(3), 0.5)
