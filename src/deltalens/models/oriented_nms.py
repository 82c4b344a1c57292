"""Non-maximum suppression of oriented boxes: the greedy rule's exact result without a loop over boxes.

The greedy rule goes through the boxes by falling score and keeps each one unless a kept one has IoU > threshold with
it. Here the best boxes left are decided together, 64 at first and twice as many each time: which of them are kept, and
then which of the others those suppress. So in a crowd few pairs are computed, and without one few blocks.

Within a block the pairs with IoU > threshold are edges from the better to the worse box. In rounds, boxes without a
better neighbour are kept, their neighbours are dropped, and the edges of both are taken out. A box is decided once all
its better neighbours are, so the result is the rule's; in each round at least the best box left is decided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltalens.models.oriented_iou import overlapping_pairs, paired_iou

_FIRST_BLOCK = 64
_SLACK = 1e-4  # relative, of bounds computed in float32


@torch.no_grad()
def oriented_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the kept ones of boxes (n, 5), the best first; of equal scores the one that came first is better.

    Kept boxes have an IoU of at most `threshold` with each other, as in torchvision.ops.nms. A box with a number that
    is not finite overlaps none: it is kept, and suppresses nothing. A score that is NaN comes first.
    """
    return batched_oriented_nms(boxes, scores, None, threshold)


@torch.no_grad()
def batched_oriented_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float) -> Tensor:
    """`oriented_nms` where only boxes (n, 5) of the same label (n,) suppress each other.

    Labels choose the pairs. Boxes are not shifted class by class, which would cost precision.
    """
    _check(boxes, scores, labels, threshold)
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    found, size = [], _FIRST_BLOCK
    while len(order):
        block, rest = order[:size], order[size:]
        i, j = _suppressing_pairs(boxes, labels, block, block, threshold)
        ordered = i < j
        kept = block[_greedy(len(block), i[ordered], j[ordered])]
        found.append(kept)
        left = torch.ones_like(rest, dtype=torch.bool)
        left[_suppressing_pairs(boxes, labels, kept, rest, threshold)[1]] = False
        order, size = rest[left], 2 * size
    return torch.cat(found) if found else order


def _suppressing_pairs(
    boxes: Tensor, labels: Tensor | None, first: Tensor, second: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Rows (i, j) of the indices first (N,) and second (M,) whose boxes have IoU > threshold and the same label."""
    mine, others = boxes[first], boxes[second]
    areas, other_areas = mine[:, 2] * mine[:, 3], others[:, 2] * others[:, 3]
    pairs = []
    for _, _, i, j in overlapping_pairs(mine, others):
        area, other = areas[i], other_areas[j]
        wanted = torch.minimum(area, other) >= torch.maximum(area, other) * (threshold * (1 - _SLACK))  # bounds IoU
        if labels is not None:
            wanted &= labels[first][i] == labels[second][j]
        i, j = i[wanted], j[wanted]
        over = paired_iou(mine[i], others[j]) > threshold
        pairs.append(torch.stack([i[over], j[over]]))
    i, j = (torch.cat(pairs, 1) if pairs else first.new_zeros(2, 0)).unbind(0)
    return i, j


def _greedy(count: int, better: Tensor, worse: Tensor) -> Tensor:
    """Which of `count` boxes, best first, are kept, given the pairs that suppress."""
    kept = torch.ones(count, dtype=torch.bool, device=better.device)
    decided = torch.zeros_like(kept)
    while len(better):
        blocked = torch.zeros_like(kept)
        blocked[worse] = True
        decided |= ~blocked
        dropped = worse[decided[better]]
        kept[dropped] = False
        decided[dropped] = True
        left = ~(decided[better] | decided[worse])
        better, worse = better[left], worse[left]
    return kept


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes must be (n, 5), (cx, cy, w, h, angle), got {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("labels", labels)):
        if values is not None and values.shape != boxes.shape[:1]:
            raise ValueError(f"{name} must be ({len(boxes)},), one for each box, got {tuple(values.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be an IoU from 0 to 1, got {threshold}")
