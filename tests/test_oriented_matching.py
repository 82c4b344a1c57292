"""Which anchor speaks for which oriented box: cases by hand, and torchvision's matcher on the whole matrix."""

import math

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from deltalens.backbones.dense import oriented_matching
from deltalens.backbones.dense.oriented_anchors import upright_as_oriented
from deltalens.backbones.dense.oriented_matching import match
from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import oriented_iou


def anchors_of(size=96, strides=(8, 16, 32)):
    """Three shapes of three sizes at each cell."""
    found = []
    for stride in strides:
        centres = torch.cartesian_prod(torch.arange(0, size, stride), torch.arange(0, size, stride)).double()
        for scale in (4, 5, 6.3):
            for ratio in (0.5, 1.0, 2.0):
                sides = scale * stride * torch.tensor([ratio**-0.5, ratio**0.5, 0.0]).double()
                found.append(torch.cat([centres, sides.expand(len(centres), 3)], 1))
    return torch.cat(found)


def boxes_of(count, seed):
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 5, generator=random, dtype=torch.float64)
    sides = 4 + 40 * values[:, 2:4] ** 2
    return torch.cat([96 * values[:, :2], sides, math.pi * (values[:, 4:] - 0.5)], 1)


def expected(boxes, anchors, foreground=0.5, background=0.4):
    return Matcher(foreground, background, allow_low_quality_matches=True)(oriented_iou(boxes, anchors))


def test_by_hand():
    anchors = torch.tensor(
        [
            [20.0, 20.0, 20.0, 10.0, 0.0],  # IoU 1 with the first box
            [25.0, 20.0, 20.0, 10.0, 0.0],  # 150 / 250 = .6
            [27.5, 20.0, 20.0, 10.0, 0.0],  # 125 / 275 = .4545
            [30.0, 20.0, 20.0, 10.0, 0.0],  # 100 / 300
            [90.0, 90.0, 10.0, 10.0, 0.0],  # the best of the second box, though only 1 / 4
            [60.0, 90.0, 10.0, 10.0, 0.0],
        ]
    )
    boxes = torch.tensor([[20.0, 20.0, 20.0, 10.0, 0.0], [90.0, 90.0, 5.0, 5.0, 0.3]])
    assert match(boxes, anchors, 0.5, 0.4).tolist() == [0, 0, -2, -1, 1, -1]
    assert match(boxes[:0], anchors, 0.5, 0.4).tolist() == [-1] * 6


def test_the_direction_counts():
    """A diagonal bar on an upright anchor of its size, and on one that is turned as it is."""
    box = torch.tensor([[50.0, 50.0, 40.0, 8.0, math.pi / 4]])
    anchors = torch.tensor([[50.0, 50.0, 40.0, 8.0, 0.0], [50.0, 50.0, 40.0, 8.0, math.pi / 4 - math.pi]])
    assert match(box, anchors, 0.5, 0.4).tolist() == [-1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_as_torchvisions_matcher_on_all_pairs(seed, monkeypatch):
    monkeypatch.setattr(oriented_matching, "BOUNDED_AT_ONCE", 5000)  # several parts
    monkeypatch.setattr(oriented_matching, "EXACT_AT_ONCE", 1000)
    boxes, anchors = boxes_of(12, seed), anchors_of()
    found, whole = match(boxes, anchors, 0.5, 0.4), expected(boxes, anchors)
    assert torch.equal(found, whole)
    assert len(whole.unique()) > 7  # boxes, both kinds of none
    best = oriented_iou(boxes, anchors).amax(1)
    assert (best < 0.4).any()  # boxes that are matched only because every box has its best anchors


def test_a_weak_anchor_speaks_for_the_box_of_its_own_largest_iou():
    """As in torchvision: the best anchor of a box that overlaps more with another one is the other one's."""
    anchors = torch.tensor([[50.0, 50.0, 40.0, 40.0, 0.0], [50.0, 54.0, 40.0, 40.0, 0.0]])
    boxes = torch.tensor([[50.0, 44.0, 24.0, 24.0, 0.0], [50.0, 50.0, 8.0, 8.0, 0.0]])
    assert torch.equal(match(boxes, anchors, 0.5, 0.4), expected(boxes, anchors))
    assert match(boxes, anchors, 0.5, 0.4)[0] == 0
    assert oriented_iou(boxes, anchors)[1].argmax() == 0


def test_upright_boxes_are_matched_as_in_torchvisions_retinanet():
    boxes, anchors = enclosing(boxes_of(10, 7)), enclosing(anchors_of())
    whole = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    assert torch.equal(match(upright_as_oriented(boxes), upright_as_oriented(anchors), 0.5, 0.4), whole)


def test_a_box_outside_the_image_and_one_without_size_match_nothing():
    anchors = anchors_of()
    boxes = torch.tensor([[500.0, 500.0, 20.0, 10.0, 0.5], [30.0, 30.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert (match(boxes, anchors, 0.5, 0.4) == -1).all()


def test_few_pairs_are_computed_exactly(monkeypatch):
    counted = []
    exact = oriented_matching._exact
    monkeypatch.setattr(oriented_matching, "_exact", lambda b, a, i, j: (counted.append(len(i)), exact(b, a, i, j))[1])
    boxes, anchors = boxes_of(60, 0), anchors_of()
    match(boxes, anchors, 0.5, 0.4)
    assert sum(counted) < 0.1 * len(boxes) * len(anchors)
