"""Average precision of oriented boxes, as the development kit of DOTA measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import paired_iou
from deltalens.tasks.box_metrics import PASSED_OVER, RIGHT, flag, outcomes, voc_average_precision

IOUS = tuple(0.5 + 0.05 * step for step in range(10))


class OrientedAveragePrecision(Metric):
    """Average precision at IoUs of oriented boxes (Xia et al., "DOTA", CVPR 2018; the kit's Task 1).

    Detections of a class are taken by falling score over all images. One belongs to the object of its class and image
    that it overlaps most; with an IoU above the threshold it is right if it is the first there, else wrong. What
    belongs to a difficult object is passed over, and such objects are not counted. Crowds are treated as difficult.

        "map50_voc07"  AP at IoU 0.5 over eleven recalls, as the kit and DOTA's server have it
        "map50_voc"    AP at IoU 0.5, area under the curve
        "map75"        AP at IoU 0.75, area
        "map"          mean of the APs at IoU 0.5, 0.55 ... 0.95, area

    All are means over the classes that have an object; NaN where there is none. See `voc_average_precision` for the
    curve. IoUs are of exact areas in double precision; as in the kit an IoU of just the threshold is below it.

    Differs from the kit: equal scores are taken in the order of images, which the kit leaves open; a recall of 0.3
    meets the recall 3 x 0.1, which the kit's floats just miss; a class without any object is left out of the mean,
    where the kit divides by zero.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: int):
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_state("outcomes", default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add detections {"boxes" (n, 5), "labels", "scores"} and targets {"boxes" (m, 5), "labels", perhaps
        "difficult", "iscrowd"} of a batch."""
        for each, target in zip(found, targets, strict=True):
            labels = target["labels"]
            passed_over = flag(target, "difficult") | flag(target, "iscrowd")
            overlap = overlaps(each["boxes"], target["boxes"], each["labels"][:, None] == labels)
            scores = each["scores"].detach()
            outcome = [outcomes(overlap, scores, passed_over, iou, strictly=True) for iou in IOUS]
            self.scores.append(scores.float())
            self.labels.append(each["labels"])
            self.outcomes.append(torch.stack(outcome, 1).to(torch.int8))
            self.objects += torch.bincount(labels[~passed_over], minlength=len(self.objects))

    def average_precisions(self, eleven_points: bool = False, ious: Sequence[float] = IOUS) -> Tensor:
        """AP (IoUs, classes), NaN for a class without an object. ious: some of `IOUS`."""
        places = [IOUS.index(iou) for iou in ious]
        table = torch.full((len(places), len(self.objects)), torch.nan, dtype=torch.float64)
        if not len(self.scores):
            return table
        scores, labels, outcome = (dim_zero_cat(each).cpu() for each in (self.scores, self.labels, self.outcomes))
        for label, count in enumerate(self.objects.tolist()):
            own = labels == label
            for row, place in enumerate(places):
                judged = outcome[own, place]
                counted = judged != PASSED_OVER
                right = judged[counted] == RIGHT
                table[row, label] = voc_average_precision(scores[own][counted], right, count, eleven_points)
        return table

    def per_class(self, eleven_points: bool = True) -> list[float]:
        """AP of each class at IoU 0.5, NaN where it has no object."""
        return self.average_precisions(eleven_points, IOUS[:1])[0].tolist()

    def compute(self) -> dict[str, Tensor]:
        area = self.average_precisions()
        values = {
            "map50_voc07": self.average_precisions(True, IOUS[:1]).nanmean(),
            "map50_voc": area[0].nanmean(),
            "map75": area[5].nanmean(),
            "map": area.mean(0).nanmean(),
        }
        return {name: value.float().to(self.device) for name, value in values.items()}


def overlaps(found: Tensor, boxes: Tensor, comparable: Tensor | None = None) -> Tensor:
    """IoUs (n, m) of oriented boxes (n, 5) and (m, 5), in float64; -1 where `comparable` (n, m) says no.

    As in the kit, polygons are intersected only where the upright boxes around them meet, which is for few pairs.
    """
    exact = torch.float32 if found.device.type == "mps" else torch.float64  # MPS has no float64
    found, boxes = found.detach().to(exact), boxes.as_subclass(Tensor).to(found.device, exact)
    overlap = found.new_zeros(len(found), len(boxes))
    if comparable is not None:
        overlap[~comparable] = -1
    if not overlap.numel():
        return overlap
    meet = box_iou(enclosing(found), enclosing(boxes)) > 0
    rows, columns = torch.where(meet & (overlap >= 0))
    overlap[rows, columns] = paired_iou(found[rows], boxes[columns])
    return overlap
