"""The second stage of Oriented R-CNN: levels, assignment, sampling, losses, detections."""

import math

import pytest
import torch
from small_oriented_rcnn import random_boxes
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops.poolers import initLevelMapper

from deltalens.backbones.dense.oriented_regions import (
    OrientedBoxLayers,
    OrientedRegionHeads,
    OrientedRegionPooling,
    region_losses,
)
from deltalens.models.oriented_boxes import enclosing, from_upright

CHANNELS, SIZE = 4, (64, 64)


def heads(score=0.05, nms=0.1, candidates=2000, detections=100, sampled=16):
    torch.manual_seed(0)
    pool = OrientedRegionPooling([4, 8], 7, 2, 56)
    head, layers = TwoMLPHead(CHANNELS * 49, 16), OrientedBoxLayers(16, 3)
    return OrientedRegionHeads(pool, head, layers, sampled, score, nms, candidates, detections)


def maps(count=1):
    random = torch.Generator().manual_seed(1)
    return {str(n): torch.randn(count, CHANNELS, 64 // s, 64 // s, generator=random) for n, s in enumerate((4, 8))}


# ------------------------------------------------------------------ pooling
def test_levels_are_torchvisions():
    boxes = random_boxes(200, 1, torch.float32) * torch.tensor([1, 1, 8, 8, 1])
    pool = OrientedRegionPooling([4, 8, 16, 32], 7, 2, 224)
    upright = torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), 1)
    found = pool.levels_of(boxes)
    assert torch.equal(found, initLevelMapper(2, 5, 224)([upright]))
    assert set(found.tolist()) == {0, 1, 2, 3}
    sizes = torch.tensor([[0, 0, s, s, 0.3] for s in (10.0, 111.0, 112.0, 223.0, 224.0, 448.0, 2000.0)])
    assert pool.levels_of(sizes).tolist() == [0, 0, 1, 1, 2, 3, 3]  # mmdetection's of a finest scale of 56
    with pytest.raises(ValueError, match="powers of two"):
        OrientedRegionPooling([4, 12], 7, 2, 224)
    with pytest.raises(ValueError, match="powers of two"):
        OrientedRegionPooling([4, 16], 7, 2, 224)


def test_regions_are_read_where_they_lie():
    """Maps whose channels are the column and the row in pixels: pooled cells give their own places."""
    ramps = []
    for stride in (4, 8):
        cells = (torch.arange(256 // stride) + 0.5) * stride
        rows, columns = torch.meshgrid(cells, cells, indexing="ij")
        ramps.append(torch.stack((columns, rows))[None].repeat(2, 1, 1, 1))
    ramps[1][1] += 1000  # the second image's coarse map
    boxes = [
        torch.tensor([[100.0, 120, 42, 21, 0.7], [128, 100, 140, 70, -0.4]]),
        torch.tensor([[90.0, 90, 84, 84, 1.0]]),
    ]
    pooled = OrientedRegionPooling([4, 8], 7, 2, 56 * 4)(ramps, boxes)  # levels 0 and 0
    assert pooled.shape == (3, 2, 7, 7)
    pooled = OrientedRegionPooling([4, 8], 7, 2, 56)(ramps, boxes)
    for found, box, more in zip(pooled, torch.cat(boxes), (0, 0, 1000), strict=True):
        along = ((torch.arange(7) + 0.5) / 7 - 0.5) * box[2]
        across = (((torch.arange(7) + 0.5) / 7 - 0.5) * box[3])[:, None]
        x = box[0] + along * box[4].cos() - across * box[4].sin()
        y = box[1] + along * box[4].sin() + across * box[4].cos()
        assert torch.allclose(found, torch.stack((x, y)) + more, atol=0.05)
    assert OrientedRegionPooling([4, 8], 7, 2, 56)(ramps, [boxes[0][:0], boxes[0][:0]]).shape == (0, 2, 7, 7)


# ------------------------------------------------------------------ training
def test_upright_regions_are_assigned_as_torchvision_does():
    random = torch.rand(60, 4, generator=torch.Generator().manual_seed(2))
    upright = torch.cat((40 * random[:, :2], 40 * random[:, :2] + 10 + 30 * random[:, 2:]), 1)
    truth, labels = upright[:4] + 3, torch.tensor([1, 2, 2, 1])
    plain = RoIHeads(None, None, None, 0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 10)
    matched, expected = plain.assign_targets_to_proposals([upright], [truth], [labels])
    found, wanted = heads().assign(from_upright(upright), from_upright(truth), labels)
    assert torch.equal(found, expected[0])
    objects = found > 0
    assert 4 <= objects.sum() < 60
    assert torch.allclose(enclosing(wanted[objects]), truth[matched[0][objects]], atol=1e-4)


def test_assignment_by_hand():
    """A bar and the same one turned: what the upright boxes share says nothing."""
    truth = torch.tensor([[30.0, 30, 40, 6, math.pi / 4], [50, 20, 10, 10, 0]])
    regions = torch.tensor(
        [[30.0, 30, 40, 6, -math.pi / 4], [30, 30, 40, 8, math.pi / 4], [50, 20, 10, 19, 0], [50, 20, 10, 21, 0]]
    )
    labels, wanted = heads().assign(regions, truth, torch.tensor([2, 1]))
    assert labels.tolist() == [0, 2, 1, 0]
    assert torch.equal(wanted[1:3], truth)
    labels, wanted = heads().assign(regions, truth[:0], torch.zeros(0, dtype=torch.int64))
    assert labels.tolist() == [0, 0, 0, 0]
    assert torch.equal(wanted, regions)


def test_true_boxes_are_added_and_a_quarter_are_objects():
    truth = torch.tensor([[30.0, 30, 30, 6, 0.5]])
    target = {"boxes": truth, "labels": torch.tensor([2])}
    near = truth + torch.randn(40, 5, generator=torch.Generator().manual_seed(3)) * 0.01
    far = truth + torch.tensor([20.0, 0, 0, 0, 0]) + torch.zeros(40, 1)
    torch.manual_seed(0)
    regions, labels, wanted = heads().sampled_regions([torch.cat((near, far)), far[:0]], [target, target])
    assert [len(each) for each in regions] == [16, 1]
    assert sorted(labels[0].tolist()) == [0] * 12 + [2] * 4
    assert torch.equal(regions[1], truth)
    assert labels[1].tolist() == [2]
    assert torch.equal(wanted[0][labels[0] == 2], truth.expand(4, 5))


def test_losses():
    logits, deltas, wanted = torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 5)
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    found = region_losses(logits, deltas, labels, wanted)
    four = deltas[:, None, :4].expand(6, 3, 4).reshape(6, 12)  # torchvision has four numbers of each class
    expected, _ = fastrcnn_loss(logits, four, [labels], [wanted[:, :4]])
    assert torch.allclose(found["loss_classifier"], expected)
    difference = (deltas - wanted)[labels > 0].abs()
    by_hand = torch.where(difference < 1, difference**2 / 2, difference - 0.5).sum() / 6
    assert torch.allclose(found["loss_box_reg"], by_hand)
    none = region_losses(logits[:0].requires_grad_(), deltas[:0], labels[:0], wanted[:0])
    assert [each.item() for each in none.values()] == [0, 0]


def test_no_objects_no_proposals_and_both():
    network = heads().train()
    truth = {"boxes": torch.tensor([[30.0, 30, 30, 6, 0.5]]), "labels": torch.tensor([2])}
    nothing = {"boxes": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.int64)}
    proposals = random_boxes(5, 2, torch.float32)
    for regions, target in ((proposals, nothing), (proposals[:0], truth), (proposals[:0], nothing)):
        network.zero_grad()
        _, losses = network(maps(), [regions], [SIZE], [target])
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert (losses["loss_box_reg"] > 0) == (target is truth)
    found, losses = network.eval()(maps(), [proposals[:0]], [SIZE])
    assert found[0]["boxes"].shape == (0, 5)
    assert losses == {}


# ------------------------------------------------------------------ detections
class Says(nn.Module):
    """Gives what it is told, whatever comes in."""

    def __init__(self, probabilities, deltas):
        super().__init__()
        self.said = torch.tensor(probabilities).log(), deltas

    def forward(self, _):
        return self.said


def told(proposals, probabilities, deltas=None, **options):
    network = heads(**options).eval()
    network.box_predictor = Says(probabilities, torch.zeros(len(proposals), 5) if deltas is None else deltas)
    return network(maps(), [proposals], [SIZE])[0][0]


CROSS = torch.tensor([[30.0, 30, 40, 4, 0.7], [30, 30, 40, 4, -0.8], [31, 30, 40, 4, 0.7], [300, 30, 40, 4, 0.7]])


def test_detections_by_hand():
    """Crossing bars stay, a double goes in one class and stays in another, what is outside goes."""
    probabilities = [[0.1, 0.9, 0.0], [0.2, 0.5, 0.3], [0.28, 0.7, 0.02], [0.0, 1.0, 0.0]]
    found = told(CROSS, probabilities, nms=0.2)
    assert found["labels"].tolist() == [1, 1, 2]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert torch.allclose(found["boxes"], CROSS[[0, 1, 1]], atol=1e-4)
    assert len(told(CROSS, probabilities, nms=0.2, detections=2)["scores"]) == 2
    assert told(CROSS, probabilities, nms=0.2, score=0.01)["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3, 0.02])
    assert told(CROSS, probabilities, nms=0.2, candidates=2)["scores"].tolist() == pytest.approx([0.9])


def test_changes_are_in_the_regions_own_axes():
    deltas = torch.zeros(4, 5)
    deltas[0] = torch.tensor([1.0, 0, 5 * math.log(0.5), 0, 2.0])  # a tenth of the width on, half as wide, 0.2 further
    found = told(CROSS, [[0.1, 0.9, 0.0]] + [[1.0, 0.0, 0.0]] * 3, deltas)["boxes"][0]
    assert found.tolist() == pytest.approx([30 + 4 * math.cos(0.7), 30 + 4 * math.sin(0.7), 20, 4, 0.9], abs=1e-4)


def test_the_matchers_threshold():
    assert isinstance(heads().matcher, Matcher)
    assert (heads().matcher.high_threshold, heads().matcher.low_threshold) == (0.5, 0.5)
    assert not heads().matcher.allow_low_quality_matches
