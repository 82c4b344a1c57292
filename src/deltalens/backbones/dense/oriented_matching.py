"""Which anchor speaks for which oriented box, without comparing every pair exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import oriented_iou, paired_iou

BACKGROUND, BETWEEN = -1, -2  # as torchvision's Matcher has them
BOUNDED_AT_ONCE, EXACT_AT_ONCE = 2**22, 2**17  # pairs
SLACK = 1e-3  # relative: what rounding may do to IoUs and their bounds


@torch.no_grad()
def match(boxes: Tensor, anchors: Tensor, foreground: float, background: float) -> Tensor:
    """The number of the box (m, 5) that each anchor (n, 5) speaks for, -1 for background, -2 for neither: int64 (n,).

    An anchor is foreground from an IoU of `foreground` on, with the box of its largest IoU; below `background` it is
    background. The best anchors of a box (all of them where several are equally good) are foreground even so, each for
    the box of its own largest IoU. A box without a common pixel with any anchor has none.

    That is what torchvision's `Matcher` makes of the matrix of IoUs with `allow_low_quality_matches=True`, but for the
    last sentence: there such a box makes foreground of all anchors that it does not touch. In mmdetection
    (min_pos_iou=0), too, and there the best anchors of a box go to that box.

    100,000 anchors x 500 boxes are mostly far apart or of other sizes. An exact IoU is computed only of pairs whose
    upper bound allows a match: with enclosing rectangles E and areas A,

        I <= min(|E1 & E2|, A1, A2),      IoU <= I / (A1 + A2 - I)
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    of_box, of_anchor = _pairs(boxes, anchors, torch.full_like(boxes[:, 0], background))
    values = _exact(boxes, anchors, of_box, of_anchor)
    best = values.new_zeros(len(anchors)).scatter_reduce(0, of_anchor, values, "amax")
    first = values == best[of_anchor]
    owner = torch.full((len(anchors),), len(boxes), dtype=torch.int64, device=anchors.device)
    owner = owner.scatter_reduce(0, of_anchor[first], of_box[first], "amin")
    matched = torch.where(best >= foreground, owner, torch.where(best >= background, BETWEEN, BACKGROUND))

    highest = values.new_zeros(len(boxes)).scatter_reduce(0, of_box, values, "amax")
    winners = of_anchor[(values == highest[of_box]) & (values > 0)]
    hard = (highest < background).nonzero()[:, 0]
    if len(hard):
        winners = torch.cat([winners, _best_anchors(boxes[hard], anchors, highest[hard])])
    winners = winners.unique()
    winners = winners[best[winners] < foreground]
    known = best[winners] >= background
    matched[winners[known]] = owner[winners[known]]
    unknown = winners[~known]
    if len(unknown):
        matched[unknown] = oriented_iou(boxes, anchors[unknown]).argmax(0)
    return matched


def _best_anchors(boxes: Tensor, anchors: Tensor, reached: Tensor) -> Tensor:
    """Anchors with the largest IoU of each box, which is at least `reached`."""
    likely = torch.cat([bounds.argmax(1) for _, bounds in _bounds(boxes, anchors)])
    reached = torch.maximum(reached, paired_iou(boxes, anchors[likely]))
    of_box, of_anchor = _pairs(boxes, anchors, reached)
    values = _exact(boxes, anchors, of_box, of_anchor)
    highest = values.new_zeros(len(boxes)).scatter_reduce(0, of_box, values, "amax")
    return of_anchor[(values == highest[of_box]) & (values > 0)]


def _pairs(boxes: Tensor, anchors: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of boxes and anchors whose IoU may reach `least` (m,) of the box."""
    least, found = least * (1 - SLACK), []
    for start, bounds in _bounds(boxes, anchors):
        near = ((bounds >= least[start : start + len(bounds), None]) & (bounds > 0)).nonzero()
        found.append(near + near.new_tensor([start, 0]))
    pairs = torch.cat(found)
    return pairs[:, 0], pairs[:, 1]


def _bounds(boxes: Tensor, anchors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What the IoUs of boxes (m, 5) with anchors (n, 5) cannot exceed: (first row, (rows, n)) in turn."""
    around, around_anchors = enclosing(boxes), enclosing(anchors)
    areas, anchor_areas = boxes[:, 2] * boxes[:, 3], anchors[:, 2] * anchors[:, 3]
    rows = max(1, BOUNDED_AT_ONCE // max(1, len(anchors)))
    for start in range(0, len(boxes), rows):
        part = slice(start, start + rows)
        shared = torch.minimum(_overlap(around[part], around_anchors), anchor_areas)
        shared = torch.minimum(shared, areas[part, None])
        whole = areas[part, None] + anchor_areas - shared
        yield start, shared / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Areas (m, n) that upright boxes (m, 4) and (n, 4) share."""
    width = torch.minimum(first[:, None, 2], second[:, 2]).sub_(torch.maximum(first[:, None, 0], second[:, 0]))
    height = torch.minimum(first[:, None, 3], second[:, 3]).sub_(torch.maximum(first[:, None, 1], second[:, 1]))
    return width.clamp_(min=0).mul_(height.clamp_(min=0))


def _exact(boxes: Tensor, anchors: Tensor, of_box: Tensor, of_anchor: Tensor) -> Tensor:
    parts = zip(of_box.split(EXACT_AT_ONCE), of_anchor.split(EXACT_AT_ONCE), strict=True)
    return torch.cat([paired_iou(boxes[box], anchors[anchor]) for box, anchor in parts])
