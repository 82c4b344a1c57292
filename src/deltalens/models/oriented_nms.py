"""Non-maximum suppression of oriented boxes: the greedy rule's exact result without a loop over boxes.

The greedy rule goes through the boxes by falling score and keeps each one unless a kept one has IoU > threshold with it.
Here the pairs with IoU > threshold are found first, as edges from the better to the worse box. Then, in rounds:

    boxes without a better neighbour are kept; their neighbours are dropped; edges of both are taken out.

A box is decided once all its better neighbours are, so the result is the rule's; the best box left is decided in each
round. The number of rounds is that of a chain of overlaps, a few in practice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltalens.models.oriented_iou import overlapping_pairs, paired_iou

_SLACK = 1e-4  # relative, of bounds computed in float32


@torch.no_grad()
def oriented_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the kept ones of boxes (n, 5), the best first; of equal scores the one that came first is better.

    Kept boxes have an IoU of at most `threshold` with each other, as in torchvision.ops.nms.
    """
    return batched_oriented_nms(boxes, scores, None, threshold)


@torch.no_grad()
def batched_oriented_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float) -> Tensor:
    """`oriented_nms` where only boxes (n, 5) of the same label (n,) suppress each other.

    Labels choose the pairs. Boxes are not shifted class by class, which would cost precision.
    """
    _check(boxes, scores, labels, threshold)
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].to(torch.promote_types(boxes.dtype, torch.float32))
    labels = None if labels is None else labels[order]
    better, worse = _suppressing_pairs(boxes, labels, threshold)
    return order[_greedy(len(boxes), better, worse)]


def _suppressing_pairs(boxes: Tensor, labels: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Rows (i, j), i < j, of boxes with IoU > threshold and, if given, the same label."""
    areas = boxes[:, 2] * boxes[:, 3]
    pairs = []
    for _, _, i, j in overlapping_pairs(boxes, boxes):
        wanted = i < j
        if labels is not None:
            wanted &= labels[i] == labels[j]
        i, j = i[wanted], j[wanted]
        smaller, larger = torch.minimum(areas[i], areas[j]), torch.maximum(areas[i], areas[j])
        possible = smaller >= larger * (threshold * (1 - _SLACK))  # IoU is at most smaller / larger
        i, j = i[possible], j[possible]
        over = paired_iou(boxes[i], boxes[j]) > threshold
        pairs.append(torch.stack([i[over], j[over]]))
    if not pairs:
        empty = torch.zeros(0, dtype=torch.long, device=boxes.device)
        return empty, empty
    better, worse = torch.cat(pairs, 1).unbind(0)
    return better, worse


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
