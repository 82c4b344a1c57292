"""Oriented boxes: conventions keep the rectangle and their ranges, and four points get the smallest rectangle."""

import math

import pytest
import shapely
import torch
from oriented_scenes import some_boxes, true_iou

from deltalens.models.oriented_boxes import (
    as_convention,
    boxes_of,
    corners_of,
    enclosing,
    from_upright,
    in_torchvision_degrees,
)

RANGES = {"le90": (-math.pi / 2, math.pi / 2), "le135": (-math.pi / 4, 3 * math.pi / 4), "oc": (0, math.pi / 2)}


def test_corners_turn_clockwise_on_the_screen():
    box = torch.tensor([10.0, 20.0, 8.0, 4.0, math.pi / 2])
    upright = torch.tensor([[6.0, 18.0], [14.0, 18.0], [14.0, 22.0], [6.0, 22.0]])
    torch.testing.assert_close(corners_of(box.index_fill(0, torch.tensor(4), 0)), upright)
    turned = torch.tensor([[12.0, 16.0], [12.0, 24.0], [8.0, 24.0], [8.0, 16.0]])  # the top left corner is now right
    torch.testing.assert_close(corners_of(box), turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("convention", RANGES)
def test_conventions(convention, dtype):
    boxes = some_boxes(400).to(dtype)
    ends = torch.arange(-12, 13) * (math.pi / 4)
    ends = torch.cat([ends, ends + 1e-7, ends - 1e-7, torch.tensor([-1e-30, 1e-30, -1e-9])]).to(dtype)
    at_ends = some_boxes(len(ends)).to(dtype)
    at_ends[:, 4] = ends
    boxes = torch.cat([boxes, at_ends])
    given = as_convention(boxes, convention)
    low, high = (given.new_tensor(end) for end in RANGES[convention])
    angles = given[:, 4]
    if convention == "oc":
        assert ((angles > low) & (angles <= high)).all()
    else:
        assert ((angles >= low) & (angles < high)).all()
        assert (given[:, 2] >= given[:, 3]).all()
    assert torch.equal(as_convention(given, convention), given)
    if dtype != torch.bfloat16:
        assert true_iou(boxes, given).min() > 1 - 1e-5


def test_conventions_are_differentiable():
    boxes = some_boxes(4).double().requires_grad_()
    for convention in RANGES:
        assert torch.autograd.gradcheck(lambda x, to=convention: corners_of(as_convention(x, to)), boxes)
    edge = torch.tensor([0.0, 0.0, 2.0, 1.0, -math.pi / 2 - 1e-9], requires_grad=True)
    as_convention(edge)[4].backward()
    assert edge.grad[4] == 1


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [2, 1, 3, 0]])
def test_corners_give_their_rectangle_back(order):
    boxes = as_convention(some_boxes(300))
    found = boxes_of(corners_of(boxes)[:, order])
    assert true_iou(boxes, found).min() > 1 - 1e-5
    torch.testing.assert_close(found[:, :4], boxes[:, :4], atol=1e-3, rtol=1e-5)


def test_the_smallest_rectangle_of_any_four_points():
    points = torch.randn(2000, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # some concave
    found = boxes_of(points)
    smallest = shapely.area(shapely.minimum_rotated_rectangle(shapely.multipoints(points.numpy())))
    torch.testing.assert_close(found[:, 2] * found[:, 3], torch.from_numpy(smallest))
    hulls = shapely.convex_hull(shapely.multipoints(points.numpy()))
    around = shapely.buffer(shapely.polygons(corners_of(found).numpy()), 1e-9)
    assert shapely.contains(around, hulls).all()
    assert (found[:, 2] >= found[:, 3]).all()


def test_points_on_a_line_and_equal_points():
    points = torch.tensor([[[0.0, 0.0], [10.0, 10.0], [2.0, 2.0], [2.0, 2.0]], [[3.0, 4.0]] * 4], requires_grad=True)
    found = boxes_of(points)
    torch.testing.assert_close(found[0], torch.tensor([5.0, 5.0, 200**0.5, 0.0, math.pi / 4]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0]))
    found.sum().backward()
    assert points.grad.isfinite().all()


@pytest.mark.parametrize("side", [1e-30, 1e-44])
def test_points_whose_distances_leave_float32(side):
    points = side * torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert boxes_of(points).abs().max() < 1e-15


def test_rectangles_of_points_are_differentiable():
    """Of points whose smallest rectangle is one; a triangle has three of one area, and which is taken jumps."""
    loose = torch.tensor(
        [[[0.0, 0.0], [10.0, 1.0], [12.0, 6.0], [1.9, 5.3]], [[0.0, 0.0], [9.0, 0.4], [9.5, 4.0], [-1.0, 3.0]]]
    )
    assert torch.autograd.gradcheck(boxes_of, loose.double().requires_grad_())


def test_enclosing_and_upright():
    boxes = some_boxes(300)
    corners = corners_of(boxes)
    torch.testing.assert_close(enclosing(boxes), torch.cat([corners.amin(1), corners.amax(1)], 1), atol=1e-4, rtol=0)
    upright = torch.tensor([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 4.0]])
    torch.testing.assert_close(enclosing(from_upright(upright)), upright)
    torch.testing.assert_close(from_upright(upright)[:, 2:4], torch.tensor([[4.0, 2.0], [4.0, 2.0]]))
    assert from_upright(torch.zeros(0, 4)).shape == boxes_of(torch.zeros(0, 4, 2)).shape == (0, 5)


def test_torchvisions_degrees():
    convert = pytest.importorskip("torchvision.ops").box_convert
    boxes = some_boxes(50, extent=100)
    corners = convert(in_torchvision_degrees(boxes), "cxcywhr", "xyxyxyxy").view(-1, 4, 2)
    torch.testing.assert_close(corners, corners_of(boxes), atol=1e-3, rtol=0)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="le135"):
        as_convention(torch.zeros(1, 5), "le180")
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 5\)"):
        corners_of(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="floating point"):
        enclosing(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="four points"):
        boxes_of(torch.zeros(3, 8))
