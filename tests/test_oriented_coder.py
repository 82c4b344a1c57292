"""Oriented boxes as codes of anchors: round trips, names of one rectangle, mmrotate's definitions, upright boxes."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from deltalens.backbones.dense.oriented_anchors import upright_as_oriented
from deltalens.backbones.dense.oriented_coder import OrientedCoder
from deltalens.models.oriented_boxes import as_convention, corners_of, enclosing


def some_boxes(count=400, seed=0):
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 5, generator=random, dtype=torch.float64)
    low = torch.tensor([0, 0, 5, 5, -2 * math.pi], dtype=torch.float64)
    return low + values * torch.tensor([100, 100, 60, 60, 4 * math.pi], dtype=torch.float64)


def upright_anchors(count=400, seed=1):
    return torch.cat([some_boxes(count, seed)[:, :4], torch.zeros(count, 1, dtype=torch.float64)], 1)


CODERS = {
    "as published": {},
    "le135": {"convention": "le135"},
    "oc": {"convention": "oc"},
    "le90, sides kept": {"edge_swap": False},
    "le135, sides kept": {"edge_swap": False, "convention": "le135"},
    "oc, sides kept": {"edge_swap": False, "convention": "oc"},
    "image axes": {"proj_xy": False},
    "angles in parts of a half turn": {"norm_factor": 0.5},
    "stds": {"stds": (0.1, 0.1, 0.2, 0.2, 0.1)},
}


@pytest.mark.parametrize("anchors", [upright_anchors(), some_boxes(seed=1)], ids=["upright", "oriented"])
@pytest.mark.parametrize("options", CODERS.values(), ids=CODERS)
def test_round_trip(options, anchors):
    coder, boxes = OrientedCoder(**options), some_boxes()
    found = coder.decode(coder.encode(boxes, anchors), anchors)
    expected = as_convention(boxes, coder.convention)
    assert torch.allclose(found[:, :4], expected[:, :4], atol=1e-9)
    turn = (found[:, 4] - expected[:, 4]).abs()
    assert torch.minimum(turn, math.pi - turn).max() < 1e-9


@pytest.mark.parametrize("edge_swap", [True, False])
def test_one_rectangle_has_one_code(edge_swap):
    coder, anchors, boxes = OrientedCoder(edge_swap=edge_swap), upright_anchors(), some_boxes()
    names = [
        boxes,
        boxes + torch.tensor([0, 0, 0, 0, math.pi], dtype=torch.float64),
        boxes[:, [0, 1, 3, 2, 4]] + torch.tensor([0, 0, 0, 0, math.pi / 2], dtype=torch.float64),
    ]
    codes = [coder.encode(each, anchors) for each in names]
    assert all(torch.allclose(each, codes[0], atol=1e-9) for each in codes)
    limit = math.pi / 4 if edge_swap else math.pi / 2
    assert codes[0][:, 4].abs().max() <= limit
    assert codes[0][:, 4].abs().max() > 0.95 * limit


def test_codes_by_hand():
    """A long bar, nearly upright, on a tall anchor: its sides change their names, and it is turned a little."""
    box = torch.tensor([[14.0, 22.0, 40.0, 10.0, math.pi / 2 - 0.1]])
    anchor = torch.tensor([[10.0, 20.0, 20.0, 40.0, 0.0]])
    codes = OrientedCoder().encode(box, anchor)
    assert codes[0].tolist() == pytest.approx([4 / 20, 2 / 40, math.log(10 / 20), 0.0, -0.1], abs=1e-5)
    kept = OrientedCoder(edge_swap=False).encode(box, anchor)
    assert kept[0].tolist() == pytest.approx(
        [4 / 20, 2 / 40, math.log(2), math.log(10 / 40), math.pi / 2 - 0.1], abs=1e-5
    )
    turned = torch.tensor([[10.0, 20.0, 20.0, 40.0, math.pi / 6]])
    codes = OrientedCoder(norm_factor=2.0, stds=(1, 1, 1, 1, 0.1)).encode(box, turned)
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    assert codes[0, :2].tolist() == pytest.approx([(4 * c + 2 * s) / 20, (2 * c - 4 * s) / 40], abs=1e-5)
    assert float(codes[0, 4]) == pytest.approx((-math.pi / 6 - 0.1) / (2 * math.pi) / 0.1, abs=1e-5)


@pytest.mark.parametrize("edge_swap", [True, False])
def test_upright_boxes_have_torchvisions_codes(edge_swap):
    coder, theirs = OrientedCoder(edge_swap=edge_swap, convention="oc"), BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = enclosing(some_boxes()), enclosing(upright_anchors())
    if not edge_swap:  # oc calls upright boxes a quarter turn, with sides swapped
        coder = OrientedCoder(edge_swap=False)
        wide = boxes[:, 2] - boxes[:, 0] > boxes[:, 3] - boxes[:, 1]
        boxes, anchors = boxes[wide], anchors[wide]
    codes = coder.encode(upright_as_oriented(boxes), upright_as_oriented(anchors))
    expected = theirs.encode_single(boxes, anchors)
    assert torch.allclose(codes[:, :4], expected, atol=1e-9)
    assert codes[:, 4].abs().max() == 0
    changes = torch.cat([0.3 * torch.randn(len(boxes), 4, dtype=torch.float64), codes[:, 4:]], 1)
    found = enclosing(coder.decode(changes, upright_as_oriented(anchors)))
    assert torch.allclose(found, theirs.decode_single(changes[:, :4], anchors), atol=1e-9)


def test_sides_change_at_most_by_a_factor_of_62_and_tiny_boxes_stay_finite():
    anchors = torch.tensor([[10.0, 10.0, 8.0, 8.0, 0.0]])
    found = OrientedCoder().decode(torch.tensor([[0.0, 0.0, 99.0, -99.0, 0.0]]), anchors)
    assert found[0, 2:4].tolist() == pytest.approx([8 * 62.5, 8 / 62.5])
    codes = OrientedCoder().encode(torch.tensor([[10.0, 10.0, 0.0, 0.0, 0.0]]), anchors)
    assert codes[0, 2:4].tolist() == pytest.approx([math.log(0.1 / 8)] * 2)


def test_gradients_of_decoding():
    anchors = some_boxes(3, 3)
    for options in CODERS.values():
        coder = OrientedCoder(**options)
        codes = coder.encode(some_boxes(3, 4), anchors).requires_grad_()
        assert torch.autograd.gradcheck(lambda each, coder=coder: corners_of(coder.decode(each, anchors)).sum(1), codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "le180"}, "one of le90, le135, oc, got 'le180'"),
        ({"norm_factor": 0.0}, "must be positive"),
        ({"stds": (1, 1, 1, 1, 0)}, "five positive numbers"),
        ({"stds": (1, 1, 1, 1)}, "five positive numbers"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        OrientedCoder(**options)
