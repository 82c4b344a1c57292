"""Oriented boxes: corners, the smallest rectangle of four points, angle conventions, enclosing upright boxes.

An oriented box is (cx, cy, w, h, a): centre and sides in pixels, angle in radians. The axes are the image's, x to the
right and y down. A positive angle turns the x axis towards the y axis, clockwise on the screen:

    u = (cos a, sin a),  v = (-sin a, cos a),  corners = centre +- w/2 u +- h/2 v.

mmrotate counts angles in the same way. torchvision's "cxcywhr" has degrees, counter-clockwise: (cx, cy, w, h,
-180 a / pi), see `in_torchvision_degrees`.

One rectangle has many such rows. A convention chooses one of them:

    le90    w >= h, a in [-pi/2, pi/2)      ("long edge"; ours and mmrotate's for Oriented R-CNN and RetinaNet)
    le135   w >= h, a in [-pi/4, 3 pi/4)
    oc      a in (0, pi/2], either side may be the longer (OpenCV from 4.5.1 on)

Ranges hold exactly in the dtype of the boxes, with its rounded pi. Everything is differentiable where the rectangle is
unique.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

Convention = Literal["le90", "le135", "oc"]
_LOWEST = {"le90": -math.pi / 2, "le135": -math.pi / 4}
_SIGNS = ((-1, -1), (1, -1), (1, 1), (-1, 1))  # along u, along v; at angle 0 from the top left clockwise
_PAIRS = tuple(zip(*((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)), strict=True))  # sides first, then diagonals
_POINT = 1e-15  # nearer points are one: squares of smaller numbers leave float32
assert {tuple(sorted(pair)) for pair in zip(*_PAIRS, strict=True)} == set(combinations(range(4), 2))


def corners_of(boxes: Tensor) -> Tensor:
    """Corners (..., 4, 2) of boxes (..., 5): at angle 0 top left, top right, bottom right, bottom left."""
    _check_last(boxes, 5, "boxes")
    centre, w, h, a = boxes[..., :2], boxes[..., 2], boxes[..., 3], boxes[..., 4]
    cos, sin = a.cos() / 2, a.sin() / 2
    along = torch.stack([w * cos, w * sin], -1)
    across = torch.stack([-h * sin, h * cos], -1)
    return torch.stack([centre + i * along + j * across for i, j in _SIGNS], -2)


def boxes_of(corners: Tensor) -> Tensor:
    """The rectangles (..., 5) in le90 of least area around four points (..., 4, 2), given in any order.

    One side of such a rectangle lies on an edge of the points' convex hull. A hull's edges are among the six lines
    through two of the points, and no other line gives a smaller rectangle, so the smallest of the six is taken; of
    equals the first. Concave and crossed quadrilaterals, points on a line and equal points need no case of their own:
    the last two give sides of length 0. The same rectangle as cv2.minAreaRect, but for ties (an acute triangle has
    three).
    """
    if corners.ndim < 2 or corners.shape[-2:] != (4, 2):
        raise ValueError(f"corners must be (..., 4, 2), four points as (x, y), got {tuple(corners.shape)}")
    middle = corners.mean(-2)
    points = corners - middle[..., None, :]
    lines = points[..., list(_PAIRS[1]), :] - points[..., list(_PAIRS[0]), :]
    real = (lines.abs() > _POINT).any(-1)
    lines = torch.where(real[..., None], lines, lines.new_tensor([1.0, 0.0]))
    u = lines / torch.linalg.vector_norm(lines, dim=-1, keepdim=True)
    v = torch.stack([-u[..., 1], u[..., 0]], -1)
    along = (points[..., None, :, :] * u[..., :, None, :]).sum(-1)  # (..., 6 lines, 4 points)
    across = (points[..., None, :, :] * v[..., :, None, :]).sum(-1)
    (left, right), (top, bottom) = along.aminmax(dim=-1), across.aminmax(dim=-1)
    w, h = right - left, bottom - top
    best = torch.where(real, w * h, torch.inf).argmin(-1, keepdim=True)

    def chosen(values: Tensor) -> Tensor:
        return values.gather(-1, best).squeeze(-1)

    ux, uy, i, j = chosen(u[..., 0]), chosen(u[..., 1]), chosen(left + right) / 2, chosen(top + bottom) / 2
    centre = middle + torch.stack([i * ux - j * uy, i * uy + j * ux], -1)
    return as_convention(torch.cat([centre, torch.stack([chosen(w), chosen(h), torch.atan2(uy, ux)], -1)], -1))


def as_convention(boxes: Tensor, convention: Convention = "le90") -> Tensor:
    """The same rectangles (..., 5) with sides and angles as the convention wants them.

        (w, h, a) = (w, h, a + pi) = (h, w, a + pi/2)

    Angles of any size come in. Those in the range with sides in order come out unchanged, to the bit.
    """
    _check_last(boxes, 5, "boxes")
    if convention not in get_args(Convention):
        raise ValueError(f"unknown convention {convention!r}; known: {', '.join(get_args(Convention))}")
    centre, w, h, a = boxes[..., :2], boxes[..., 2], boxes[..., 3], boxes[..., 4]
    swapped, a = _first_quadrant(a) if convention == "oc" else _half_turn(a, w < h, _LOWEST[convention])
    return torch.cat([centre, torch.stack([torch.where(swapped, h, w), torch.where(swapped, w, h), a], -1)], -1)


def _half_turn(a: Tensor, swapped: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
    """Angles in [lowest, lowest + pi), a quarter turn further where the sides are swapped."""
    low = a.new_tensor(lowest)
    high = a.new_tensor(lowest + math.pi)
    a = torch.where(swapped, a + math.pi / 2, a)
    turned = a - math.pi * ((a - lowest) / math.pi).floor()
    a = torch.where((a >= low) & (a < high), a, turned)
    return swapped, torch.where((a >= low) & (a < high), a, low + (a - a.detach()))  # rounded out: both ends are one


def _first_quadrant(a: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the sides are swapped, and angles in (0, pi/2]."""
    high = a.new_tensor(math.pi / 2)
    quarters = (a / (math.pi / 2)).ceil() - 1
    quarters = torch.where((a > 0) & (a <= high), 0, quarters)
    turned = a - quarters * (math.pi / 2)
    below = turned <= 0  # by rounding: the end that is not in the range, so a quarter turn back
    a = torch.where(below | (turned > high), high + (a - a.detach()), turned)
    return (torch.where(below, quarters - 1, quarters).remainder(2) == 1), a


def half_extents(boxes: Tensor) -> Tensor:
    """Half the width and height (..., 2) of the enclosing upright boxes: (w |cos a| + h |sin a|) / 2, and likewise."""
    _check_last(boxes, 5, "boxes")
    w, h, cos, sin = boxes[..., 2], boxes[..., 3], boxes[..., 4].cos().abs(), boxes[..., 4].sin().abs()
    return torch.stack([w * cos + h * sin, w * sin + h * cos], -1) / 2


def enclosing(boxes: Tensor) -> Tensor:
    """The smallest upright boxes (..., 4), x1 y1 x2 y2, around boxes (..., 5)."""
    half = half_extents(boxes)
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def from_upright(boxes: Tensor) -> Tensor:
    """Upright boxes (..., 4), x1 y1 x2 y2, as oriented ones (..., 5) in le90: angle 0, or -pi/2 if taller than wide."""
    _check_last(boxes, 4, "upright boxes")
    low, high = boxes[..., :2], boxes[..., 2:]
    return as_convention(torch.cat([(low + high) / 2, high - low, torch.zeros_like(boxes[..., :1])], -1))


def in_torchvision_degrees(boxes: Tensor) -> Tensor:
    """Boxes (..., 5) as torchvision's "cxcywhr": degrees, counter-clockwise."""
    _check_last(boxes, 5, "boxes")
    return torch.cat([boxes[..., :4], -torch.rad2deg(boxes[..., 4:])], -1)


def _check_last(boxes: Tensor, count: int, name: str) -> None:
    if boxes.ndim == 0 or boxes.shape[-1] != count:
        wanted = "(cx, cy, w, h, angle)" if count == 5 else "(x1, y1, x2, y2)"
        raise ValueError(f"{name} must be (..., {count}), {wanted}, got {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {boxes.dtype}; convert them with .float()")
