"""Which proposed regions a stage is trained on, and what each of them should have found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

POSITIVE_SHARE = 0.25


@dataclass(frozen=True)
class Regions:
    """Regions of a batch, one tensor an image. boxes (n, 4) xyxy pixels. labels (n,): 0 is the background. matched
    (n,): the number of the object that each belongs to, 0 where there is none. true_boxes (n, 4): that object's box,
    zeros in images without objects. added (n,) bool: the objects' own boxes, which no stage proposed.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]
    true_boxes: list[Tensor]
    added: list[Tensor]


class RegionSampler:
    """Proposals (n, 4) and targets of each image -> `Regions` to train on.

    The objects' own boxes join the proposals. Of every region the object with the largest IoU is its own where that
    IoU is at least `threshold`; else it is background. None lies between, and no object keeps its best region below
    the threshold. Of each image `count` regions are drawn at random, at most a quarter of them with an object.
    """

    def __init__(self, threshold: float, count: int):
        self.matcher = Matcher(threshold, threshold, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(count, POSITIVE_SHARE)

    def __call__(self, proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Regions:
        truths = [target["boxes"].to(each.dtype) for each, target in zip(proposals, targets, strict=True)]
        boxes = [torch.cat([each, truth]) for each, truth in zip(proposals, truths, strict=True)]
        pairs = [
            self._matched(each, truth, target["labels"])
            for each, truth, target in zip(boxes, truths, targets, strict=True)
        ]
        kept = [
            torch.where(positive | negative)[0]
            for positive, negative in zip(*self.sampler([labels for _, labels in pairs]), strict=True)
        ]
        found = Regions([], [], [], [], [])
        for rows, each, truth, proposed, (matched, labels) in zip(kept, boxes, truths, proposals, pairs, strict=True):
            found.boxes.append(each[rows])
            found.labels.append(labels[rows])
            found.matched.append(matched[rows])
            found.true_boxes.append(truth[matched[rows]] if len(truth) else each.new_zeros(len(rows), 4))
            found.added.append(rows >= len(proposed))
        return found

    def _matched(self, boxes: Tensor, truth: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(the object of each box, its label)."""
        if not len(truth):
            nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return nothing, nothing.clone()
        objects = self.matcher(box_iou(truth, boxes))
        nearest = objects.clamp(min=0)
        return nearest, labels[nearest].to(torch.int64) * (objects >= 0)
