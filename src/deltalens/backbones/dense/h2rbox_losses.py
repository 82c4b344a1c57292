"""What H2RBox-v2 learns from: cells of upright boxes, circumscribed boxes, and angles of two views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deltalens.backbones.dense.h2rbox_views import SecondView
from deltalens.backbones.dense.phase_coder import decode_angles

BETA = 0.1  # of the smooth L1, in radians
SMALLEST_IOU = 1e-6


def owners(boxes: Tensor, points: Tensor, strides: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The number of the box (m, 5) that each point (n, 2) speaks for, or -1, and its distances (n, 4) to that box's
    sides.

    As in FCOS, in the box's own axes: the point lies inside the box and, along each axis, within radius x stride of its
    centre; the farthest side is 4 to 8 strides away (on the finest level down to 0, on the coarsest without end). Of
    several boxes the smallest.
    """
    if not len(boxes):
        return torch.full((len(points),), -1, dtype=torch.int64, device=points.device), points.new_zeros(len(points), 4)
    offsets = points[:, None] - boxes[:, :2]
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    along, across = cos * offsets[..., 0] + sin * offsets[..., 1], cos * offsets[..., 1] - sin * offsets[..., 0]
    half_w, half_h = boxes[:, 2] / 2, boxes[:, 3] / 2
    distances = torch.stack([half_w + along, half_h + across, half_w - along, half_h - across], -1)
    reach = radius * strides[:, None]
    allowed = (distances.amin(-1) > 0) & (along.abs() < reach) & (across.abs() < reach)
    farthest = distances.amax(-1)
    least = torch.where(strides == strides.min(), 0, 4 * strides)
    most = torch.where(strides == strides.max(), torch.inf, 8 * strides)
    allowed &= (farthest >= least[:, None]) & (farthest <= most[:, None])
    areas = torch.where(allowed, boxes[:, 2] * boxes[:, 3], torch.inf)
    smallest, owner = areas.min(1)
    rows = torch.arange(len(points), device=points.device)
    return torch.where(smallest.isinf(), -1, owner), distances[rows, owner]


def centreness(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) min(t, b) / max(t, b)) of distances (n, 4), which are positive."""
    left, top, right, bottom = distances.unbind(-1)
    wide = torch.minimum(left, right) / torch.maximum(left, right)
    return (wide * torch.minimum(top, bottom) / torch.maximum(top, bottom)).sqrt()


def boxes_around(points: Tensor, distances: Tensor, angles: Tensor) -> Tensor:
    """Boxes (n, 5) whose sides lie `distances` (n, 4), left, top, right and bottom in their own axes, from points."""
    left, top, right, bottom = distances.unbind(-1)
    along, across, cos, sin = (right - left) / 2, (bottom - top) / 2, angles.cos(), angles.sin()
    x, y = points[:, 0] + cos * along - sin * across, points[:, 1] + sin * along + cos * across
    return torch.stack([x, y, left + right, top + bottom, angles], 1)


def circumscribed_loss(found: Tensor, given: Tensor) -> Tensor:
    """-log IoU (n,) of given boxes (n, 5) and the boxes of their directions around the found ones (n, 5).

    Given boxes are upright ones of the first view, turned with the second. The found box is enclosed by one of the
    given box's direction, and both are compared along their axes, which gives their exact IoU. The authors' code takes
    centres along the image's axes, which is another number where the given box is turned.
    """
    turn = found[:, 4] - given[:, 4]
    cos, sin = turn.cos().abs(), turn.sin().abs()
    width, height = cos * found[:, 2] + sin * found[:, 3], sin * found[:, 2] + cos * found[:, 3]
    shift = found[:, :2] - given[:, :2]
    axis_cos, axis_sin = given[:, 4].cos(), given[:, 4].sin()
    along = axis_cos * shift[:, 0] + axis_sin * shift[:, 1]
    across = axis_cos * shift[:, 1] - axis_sin * shift[:, 0]
    shared = _shared(along, width, given[:, 2]) * _shared(across, height, given[:, 3])
    whole = width * height + given[:, 2] * given[:, 3] - shared
    return -(shared / whole.clamp(min=SMALLEST_IOU)).clamp(min=SMALLEST_IOU).log()


def _shared(shift: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The length that two intervals have in common, whose middles are `shift` apart."""
    ends = torch.minimum(shift + first / 2, second / 2) - torch.maximum(shift - first / 2, -second / 2)
    return ends.clamp(min=0)


def symmetry_loss(codes: Tensor, objects: Tensor, second: Tensor, square: Tensor, view: SecondView) -> Tensor:
    """How far the angles of objects in both views contradict the view: smooth L1 (beta 0.1) of `disagreement`, averaged
    over objects that are seen in both.

    codes (n, 3) of foreground cells, the number of each cell's object (n,), whether it is of the second view (n,);
    square (objects,): whose angle means nothing, and costs nothing. An object's angle is that of the mean code of its
    cells.
    """
    count = len(square)
    rows = objects + count * second.long()
    sums = codes.new_zeros(2 * count, codes.shape[1]).index_add(0, rows, codes)
    cells = codes.new_zeros(2 * count).index_add(0, rows, codes.new_ones(len(codes)))
    means = sums / cells.clamp(min=1)[:, None]
    both = ((cells[:count] > 0) & (cells[count:] > 0)).nonzero()[:, 0]
    if not len(both):
        return codes.sum() * 0
    apart = view.disagreement(decode_angles(means[both]), decode_angles(means[count + both]))
    apart = torch.where(square[both], 0, apart)
    return functional.smooth_l1_loss(apart, torch.zeros_like(apart), beta=BETA)
