"""Areas and IoU of oriented boxes against shapely, on pairs of every awkward kind."""

import math

import numpy as np
import pytest
import torch
from oriented_scenes import some_boxes, true_areas, true_iou

import deltalens.models.oriented_iou as module
from deltalens.models.oriented_iou import oriented_intersection, oriented_iou, paired_intersection, paired_iou

COUNT = 500


def thin(seed):
    boxes = some_boxes(COUNT, seed=seed)
    boxes[:, 3] = boxes[:, 2] / 100
    return boxes


def beside(boxes):
    """Shifted along the first side by its length: the two share a whole side, but for rounding."""
    a, w = boxes[:, 4], boxes[:, 2]
    return boxes + torch.stack([w * a.cos(), w * a.sin(), 0 * w, 0 * w, 0 * w], 1)


def changed(boxes, *, scale=1.0, turn=0.0, shift=0.0):
    boxes = boxes.clone()
    boxes[:, :2] += shift
    boxes[:, 2:4] *= scale
    boxes[:, 4] += turn
    return boxes


A, B, THIN = some_boxes(COUNT), some_boxes(COUNT, seed=1), thin(2)
FLAT = torch.cat([A[:, :3], 0 * A[:, 3:4], A[:, 4:]], 1)
LATTICE = torch.cat([A[:, :4].round(), torch.randint(8, (COUNT, 1)) * (math.pi / 4)], 1)
LATTICE_B = torch.cat([B[:, :4].round(), torch.randint(8, (COUNT, 1)) * (math.pi / 4)], 1)
PAIRS = {
    "random": (A, B),
    "thin": (THIN, thin(3)),
    "thin, nearly parallel": (THIN, changed(THIN, turn=1e-3)),
    "no height": (FLAT, B),
    "no area, both": (FLAT, 0 * B),
    "the same": (A, A.clone()),
    "the same, otherwise written": (A, torch.cat([A[:, :2], A[:, [3, 2]], A[:, 4:] + math.pi / 2], 1)),
    "a side in common": (A, beside(A)),
    "corners and sides on a lattice": (LATTICE, LATTICE_B),
    "one in the other": (A, changed(A, scale=0.3, turn=1.0)),
    "one far larger": (A, changed(B, scale=1000)),
    "far from the origin": (changed(A, shift=1e4), changed(B, shift=1e4)),
} | {f"turned by {turn}": (A, changed(A, turn=turn)) for turn in (1e-4, 1e-5, 1e-6, 1e-7)}


@pytest.mark.parametrize("kind", PAIRS)
def test_areas_are_shapelys(kind):
    first, second = PAIRS[kind]
    inter, _ = true_areas(first, second)
    smaller = np.minimum(*(boxes[:, 2:4].double().prod(1).numpy() for boxes in (first, second)))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        iou = paired_iou(first.to(dtype), second.to(dtype)).numpy()
        assert np.abs(iou - true_iou(first, second)).max() < tolerance
        areas = paired_intersection(first.to(dtype), second.to(dtype)).numpy()
        assert (np.abs(areas - inter) <= 2 * tolerance * smaller).all()
        swapped = paired_iou(second.to(dtype), first.to(dtype)).numpy()
        np.testing.assert_allclose(swapped, iou, atol=tolerance)


def test_all_pairs_are_the_paired_ones(monkeypatch):
    first, second = some_boxes(60, extent=150), some_boxes(41, extent=150, seed=1)
    i, j = torch.meshgrid(torch.arange(60), torch.arange(41), indexing="ij")
    want = paired_iou(first[i.flatten()], second[j.flatten()]).view(60, 41)
    areas = paired_intersection(first[i.flatten()], second[j.flatten()]).view(60, 41)
    assert 0.2 < (want > 0).float().mean() < 0.8
    torch.testing.assert_close(oriented_iou(first, second), want)
    monkeypatch.setattr(module, "_BLOCK", 100)
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 7})
    torch.testing.assert_close(oriented_iou(first, second), want)
    torch.testing.assert_close(oriented_intersection(first, second), areas)
    for shape in ((0, 4), (4, 0), (0, 0)):
        assert oriented_iou(first[: shape[0]], second[: shape[1]]).shape == shape


def test_motions_change_nothing():
    turn, (x, y) = 0.7, (3.0, -40.0)
    rotation = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    moved = []
    for boxes in (A.double(), B.double()):
        centres = boxes[:, :2] @ rotation + torch.tensor([x, y])
        moved.append(torch.cat([centres, boxes[:, 2:4], boxes[:, 4:] + turn], 1))
    torch.testing.assert_close(paired_iou(*moved), paired_iou(A.double(), B.double()), atol=1e-13, rtol=0)


def test_gradients():
    first, second = some_boxes(30).double().requires_grad_(), some_boxes(30, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(paired_iou, (first, second))
    assert torch.autograd.gradcheck(oriented_iou, (first[:6], second[:4]))


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_are_finite(kind):
    first, second = (boxes.clone().requires_grad_() for boxes in PAIRS[kind])
    paired_iou(first, second).sum().backward()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


def test_gradients_hold_in_float32_for_nearly_parallel_boxes():
    """Of shifted boxes turned by 1e-5, against float64."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        first = A.to(dtype).requires_grad_()
        second = changed(A, turn=1e-5, shift=1.0).to(dtype)
        paired_iou(first, second).sum().backward()
        grads.append(first.grad.double())
    torch.testing.assert_close(*grads, atol=2e-3, rtol=1e-3)


def test_half_precision_is_computed_in_float32():
    halves = A.bfloat16(), B.bfloat16()
    iou = oriented_iou(*halves)
    assert iou.dtype == torch.float32
    assert torch.equal(iou, oriented_iou(*(boxes.float() for boxes in halves)))
    assert paired_iou(A, B.double()).dtype == torch.float64


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(n, 5\)"):
        oriented_iou(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_iou(torch.zeros(3, 5), torch.zeros(2, 5))
