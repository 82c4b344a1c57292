"""Which classes a detector takes for which, what it misses, and what it finds where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou


class BoxConfusion:
    """Counts over images, (classes + 1, classes + 1): rows are true classes, columns classes found, the last of each
    "nothing".

    Detections with a score of at least `threshold` are taken by falling score; each takes the object that it overlaps
    most, of whatever class, among those that are left and have an IoU of at least `iou`. Objects that none takes were
    found as nothing; detections that take none are of nothing. Crowds and objects marked as difficult are not counted,
    nor are detections that overlap one of them so much. overlaps: (boxes found, true boxes) -> IoUs (n, m).
    """

    def __init__(
        self,
        classes: int,
        threshold: float = 0.3,
        iou: float = 0.5,
        overlaps: Callable[[Tensor, Tensor], Tensor] = box_iou,
    ):
        self.classes, self.threshold, self.iou, self.overlaps = classes, threshold, iou, overlaps
        self.counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)

    def update(self, found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add detections {"boxes", "labels", "scores"} and targets of a batch."""
        for each, target in zip(found, targets, strict=True):
            self._add({name: each[name].cpu() for name in ("boxes", "labels", "scores")}, target)

    def _add(self, found: dict[str, Tensor], target: Mapping[str, Any]) -> None:
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= self.threshold]
        true, boxes = target["labels"].cpu(), target["boxes"].cpu().as_subclass(Tensor).float()
        passed_over = torch.zeros(len(true), dtype=torch.bool)
        for flag in ("iscrowd", "difficult"):
            if flag in target:
                passed_over |= target[flag].cpu().bool()
        overlaps = self.overlaps(found["boxes"][order].float(), boxes) if len(true) else torch.zeros(len(order), 0)
        left = ~passed_over
        for label, overlap in zip(found["labels"][order].tolist(), overlaps, strict=True):
            reach = overlap >= self.iou
            free = reach & left
            if bool(free.any()):
                place = int(torch.where(free, overlap, -1.0).argmax())
                left[place] = False
                self.counts[true[place], label] += 1
            elif not bool((reach & passed_over).any()):
                self.counts[self.classes, label] += 1
        self.counts[:, self.classes] += torch.bincount(true[left], minlength=self.classes + 1)
