"""What a stage's judgement of its regions costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss

from deltalens.backbones.dense.region_sampling import Regions

BOX_LOSSES = ("smooth_l1", "l1", "giou")


def class_loss(logits: Tensor, regions: Regions) -> Tensor:
    """The cross-entropy of logits (n, classes), averaged over all regions of the batch; 0 where there is none."""
    labels = torch.cat(regions.labels)
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum() * 0


@dataclass(frozen=True)
class BoxLoss:
    """weight / n times the sum of a loss over the regions that have an object; n counts all regions of the batch, as
    in torchvision and mmdetection.

        smooth_l1, l1:  of the four changes (dx, dy, dw, dh) in units of the coder; smooth_l1 is quadratic up to beta
        giou:           1 - GIoU of the changed region with its object's box (arXiv 1902.09630)
    """

    kind: str = "smooth_l1"
    weight: float = 1.0
    beta: float = 1.0

    def __call__(self, changes: Tensor, regions: Regions, coder: BoxCoder) -> Tensor:
        """changes: (n, 4 classes), or (n, 4) of all classes together."""
        labels = torch.cat(regions.labels)
        rows = torch.where(labels > 0)[0]
        own = of_class(changes, labels)[rows]
        boxes, truth = torch.cat(regions.boxes)[rows], torch.cat(regions.true_boxes)[rows]
        if self.kind == "giou":
            loss = generalized_box_iou_loss(coder.decode_single(own, boxes), truth, reduction="sum")
        elif self.kind == "l1":
            loss = F.l1_loss(own, coder.encode_single(truth, boxes), reduction="sum")
        else:
            loss = F.smooth_l1_loss(own, coder.encode_single(truth, boxes), beta=self.beta, reduction="sum")
        return self.weight * loss / max(1, len(labels))


def of_class(changes: Tensor, labels: Tensor) -> Tensor:
    """The changes (n, 4) of each region's class out of (n, 4 classes); (n, 4) are those of every class."""
    if changes.shape[1] == 4:
        return changes
    each = changes.unflatten(1, (-1, 4))
    return each[torch.arange(len(each), device=each.device), labels]
