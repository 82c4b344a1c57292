"""Midpoint offsets of Oriented R-CNN: the paper's definition by hand, round trips, what any six numbers become."""

import math

import pytest
import torch
from small_oriented_rcnn import random_boxes
from torchvision.models.detection._utils import BoxCoder

from deltalens.backbones.dense.midpoint_offsets import LEVEL, MidpointOffsetCoder
from deltalens.models.oriented_boxes import corners_of, enclosing, from_upright

PLAIN = MidpointOffsetCoder(stds=(1.0,) * 6)


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


def same_rectangles(one, other, tolerance=1e-8):
    """Equal sets of corners, whatever the box's name."""
    distances = torch.cdist(corners_of(one), corners_of(other))
    return bool((distances.amin(-1).amax(-1) <= tolerance).all() and (distances.amin(-2).amax(-1) <= tolerance).all())


# topmost corner (-2.5, -5) and rightmost (5.5, 1) from the centre: offsets -2.5 of a width of 11, 1 of a height of 10
THREE_FOUR_FIVE = (50.0, 40.0, 10.0, 5.0, math.atan2(3, 4))


@pytest.mark.parametrize(
    ("box", "anchor", "expected"),
    [
        ((50, 40, 10, 10, math.pi / 4), (45, 35, 55, 45), (0, 0, math.log(2**0.5), math.log(2**0.5), 0, 0)),
        (THREE_FOUR_FIVE, (44.5, 35, 55.5, 45), (0, 0, 0, 0, -2.5 / 11, 0.1)),
        (THREE_FOUR_FIVE, (30, 15, 52, 35), (9 / 22, 15 / 20, -math.log(2), -math.log(2), -2.5 / 11, 0.1)),
        ((50, 40, 20, 10, 0), (40, 35, 60, 45), (0, 0, 0, 0, 0.5, 0.5)),
        ((50, 40, 20, 10, -math.pi / 2), (45, 30, 55, 50), (0, 0, 0, 0, 0.5, 0.5)),
    ],
)
def test_by_hand(box, anchor, expected):
    found = PLAIN.encode(tensor(*box), tensor(*anchor))
    assert torch.allclose(found, tensor(*expected), atol=1e-12)
    assert torch.allclose(MidpointOffsetCoder().encode(tensor(*box), tensor(*anchor))[:, 4:], 2 * found[:, 4:])
    assert same_rectangles(PLAIN.decode(found, tensor(*anchor)), tensor(*box))


def test_the_offsets_are_those_of_the_corners():
    """Against the corners themselves: the topmost, and the rightmost."""
    boxes = random_boxes(500)
    outer, corners = enclosing(boxes), corners_of(boxes)
    found = PLAIN.encode(boxes, outer)
    top = corners.gather(1, corners[..., 1].argmin(1)[:, None, None].expand(-1, 1, 2))[:, 0]
    right = corners.gather(1, corners[..., 0].argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
    sides = outer[:, 2:] - outer[:, :2]
    assert torch.allclose(found[:, 4], (top[:, 0] - boxes[:, 0]) / sides[:, 0])
    assert torch.allclose(found[:, 5], (right[:, 1] - boxes[:, 1]) / sides[:, 1])
    assert found[:, :4].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip(dtype):
    boxes = random_boxes(2000, 1, dtype)
    special = [(9.0, 9.0, w, h, k * math.pi / 8) for w, h in ((8.0, 8.0), (90.0, 2.0)) for k in range(-4, 4)]
    boxes = torch.cat((boxes, torch.tensor(special, dtype=dtype)))
    anchors = enclosing(random_boxes(len(boxes), 2, dtype))
    coder = MidpointOffsetCoder()
    back = coder.decode(coder.encode(boxes, anchors), anchors)
    assert same_rectangles(back, boxes, 1e-8 if dtype == torch.float64 else 0.02)
    assert (back[:, 2] >= back[:, 3]).all()
    assert (back[:, 4] >= -math.pi / 2).all()
    assert (back[:, 4] < math.pi / 2).all()


def test_nearly_upright_boxes_are_upright():
    """On both sides of upright one pair of offsets is learnt, also by long boxes; no corner jumps alone."""
    turns = torch.tensor([-LEVEL, -1e-7, 0.0, 1e-7, 0.9 * LEVEL])
    boxes = torch.tensor([[50.0, 40.0, 100.0, 4.0, 0.0]]).repeat(5, 1)
    boxes[:, 4] = turns
    found = PLAIN.encode(boxes, enclosing(boxes))
    assert torch.allclose(found[:, 4:], torch.tensor(0.5), atol=3e-3)
    assert same_rectangles(PLAIN.decode(found, enclosing(boxes)), boxes, 0.02)
    boxes[:, 4] = 2 * LEVEL
    assert torch.allclose(PLAIN.encode(boxes, enclosing(boxes))[:, 4:], torch.tensor(-0.5), atol=6e-3)


def test_the_first_four_numbers_are_torchvisions():
    boxes, anchors = enclosing(random_boxes(50, 3)), enclosing(random_boxes(50, 4))
    expected = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(boxes, anchors)
    found = PLAIN.encode(from_upright(boxes), anchors)
    assert torch.allclose(found[:, :4], expected)
    assert torch.allclose(found[:, 4:], torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(enclosing(PLAIN.decode(found, anchors)), boxes)


def test_the_shorter_diagonal_is_extended():
    """Half diagonals (2, -4) and (4, 0): the second becomes as long as the first."""
    found = PLAIN.decode(tensor(0, 0, 0, 0, 0.25, 0), tensor(-4, -4, 4, 4))
    half = math.sqrt(20)
    expected = torch.tensor([[2, -4], [half, 0], [-2, 4], [-half, 0]], dtype=torch.float64)
    assert torch.cdist(corners_of(found)[0], expected).amin(0).max() < 1e-9
    zero = PLAIN.decode(torch.zeros(1, 6, dtype=torch.float64), tensor(0, 0, 20, 10))  # a square on its corner
    assert torch.allclose(zero[:, 2:4], tensor(200**0.5, 200**0.5))
    assert math.isclose(abs(zero[0, 4]), math.pi / 4)


def test_any_numbers_become_rectangles():
    random = torch.Generator().manual_seed(5)
    deltas = 3 * torch.randn(3000, 6, generator=random, dtype=torch.float64)
    anchors = enclosing(random_boxes(3000, 6))
    boxes = PLAIN.decode(deltas, anchors)
    assert boxes.isfinite().all()
    assert (boxes[:, 2:4] >= 0).all()
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * (anchors[:, 2:] - anchors[:, :2])
    assert torch.allclose(boxes[:, :2], middle)
    width, height = ((anchors[:, 2:] - anchors[:, :2]) * deltas[:, 2:4].clamp(-math.log(62.5), math.log(62.5)).exp()).T
    across, down = (deltas[:, 4:].clamp(-0.5, 0.5) * torch.stack((width, height), 1)).T
    longer = torch.maximum(torch.hypot(across, height / 2), torch.hypot(width / 2, down))
    assert torch.allclose(torch.hypot(boxes[:, 2], boxes[:, 3]) / 2, longer)
    top = torch.stack((across, -height / 2), 1)
    top = middle + top * (longer / top.norm(dim=1))[:, None]
    assert torch.cdist(corners_of(boxes), top[:, None]).amin(1).div(longer[:, None]).max() < 1e-6
    wild = PLAIN.decode(torch.tensor([[0.0, 0, 1e4, -1e4, 9, -9]]), torch.tensor([[0.0, 0, 8, 8]]))
    assert wild.isfinite().all()
    assert wild[0, 2:4].max() < 8 * 63


def test_wrong_stds():
    with pytest.raises(ValueError, match="six positive"):
        MidpointOffsetCoder(stds=(1.0, 1.0))
