"""Average precision of boxes and masks: COCO's, by faster-coco-eval, and that of the VOC challenges, our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

MASK_THRESHOLD = 0.5
COCO_NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
RIGHT, WRONG, PASSED_OVER = 1, 0, -1


class CocoAveragePrecision(MeanAveragePrecision):
    """COCO's average precision (AP over IoU 0.5 to 0.95, 101 recalls, at most 100 detections an image).

    Gives "map", "map50", "map75", and "map_small", "map_medium", "map_large" (areas below 32^2, up to 96^2, above)
    where there are objects of that size; with masks=True the same of masks with ``mask_`` before it. NaN where there is
    no object at all. Crowds are passed over as COCO does; "difficult" boxes count as crowds here, which COCO does not
    know. IoUs and recalls are COCO's in double precision: torchmetrics' own are rounded to float32, so that a recall of
    just 0.2, or an IoU of just 0.6, misses its threshold.
    """

    def __init__(self, classes: int, masks: bool = False):
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            extended_summary=True,
            backend="faster_coco_eval",
        )
        self.warn_on_many_detections = False
        self.classes = classes
        self.kinds = {"bbox_": "", "segm_": "mask_"} if masks else {"": ""}

    def update(self, found: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]) -> None:
        """Add detections {"boxes", "labels", "scores", "masks" (n, 1, H, W)} and targets of a batch."""
        super().update([self._detections(each) for each in found], [self._objects(each) for each in targets])

    def _detections(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {"boxes": found["boxes"].float(), "scores": found["scores"].float(), "labels": found["labels"]}
        return kept | ({"masks": found["masks"][:, 0] > MASK_THRESHOLD} if len(self.kinds) > 1 else {})

    def _objects(self, target: dict[str, Any]) -> dict[str, Tensor]:
        passed_over = flag(target, "iscrowd") | flag(target, "difficult")
        kept = {"boxes": target["boxes"].float(), "labels": target["labels"], "iscrowd": passed_over.long()}
        kept |= {"area": target["area"]} if "area" in target else {}
        return kept | ({"masks": target["masks"].bool()} if len(self.kinds) > 1 else {})

    def _all(self) -> dict[str, Tensor]:
        if not any(len(labels) for labels in self.groundtruth_labels):
            return {}
        return super().compute()

    def compute(self) -> dict[str, Tensor]:
        values, result = self._all(), {}
        for prefix, ours in self.kinds.items():
            for name in COCO_NAMES:
                value = float(values.get(f"{prefix}{name}", -1))
                if value >= 0 or name in COCO_NAMES[:3]:
                    measured = value if value >= 0 else torch.nan
                    result[f"{ours}{name.replace('_50', '50').replace('_75', '75')}"] = torch.tensor(measured)
        return {name: value.to(self.device) for name, value in result.items()}

    def per_class(self, masks: bool = False) -> list[float]:
        """AP of each class, NaN where it has no object."""
        found = [torch.nan] * self.classes
        values = self._all()
        if not values:
            return found
        prefix = next(prefix for prefix, ours in self.kinds.items() if bool(ours) == masks)
        precision = values[f"{prefix}precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas; 100 detections
        for number, label in enumerate(values["classes"].tolist()):
            known = precision[:, :, number][precision[:, :, number] > -1]
            if len(known):
                found[label] = float(known.mean())
        return found


class VocAveragePrecision(Metric):
    """Average precision at IoU 0.5 as in the PASCAL VOC challenges (Everingham et al., 2010), of boxes.

    Detections of a class are taken by falling score. One belongs to the object of its class that it overlaps most; with
    an IoU of at least `iou` it is right if it is the first there, else wrong. What belongs to a "difficult" object
    or a crowd is passed over, and such objects are not counted.

        precision P(k) and recall R(k) of the first k detections
        "map50_voc07"  mean over r in 0, 0.1 ... 1 of the largest P(k) with R(k) >= r            (VOC 2007)
        "map50_voc"    sum over k of (R(k) - R(k-1)) max of P(j) over j >= k                     (VOC 2010 and later)

    Both are means over the classes that have an object; NaN where there is none. Widths are right minus
    left; the challenge's tools add 1, since their boxes name the last pixel. Read as `deltalens.data.voc_boxes` reads
    them, boxes overlap here as much as there.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: int, iou: float = 0.5):
        super().__init__()
        self.iou = iou
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_state("right", default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Any]]) -> None:
        """Add detections {"boxes", "labels", "scores"} and targets of a batch."""
        for each, target in zip(found, targets, strict=True):
            passed_over = flag(target, "difficult") | flag(target, "iscrowd")
            outcome = judged(each, target["boxes"], target["labels"], passed_over, self.iou)
            counted = outcome != PASSED_OVER
            self.scores.append(each["scores"][counted].detach().float())
            self.labels.append(each["labels"][counted])
            self.right.append(outcome[counted] == RIGHT)
            self.objects += torch.bincount(target["labels"][~passed_over], minlength=len(self.objects))

    def per_class(self, eleven_points: bool = True) -> list[float]:
        """AP of each class, NaN where it has no object."""
        if not len(self.scores):
            return [torch.nan] * len(self.objects)
        scores, labels, right = (dim_zero_cat(each).cpu() for each in (self.scores, self.labels, self.right))
        return [
            voc_average_precision(scores[labels == label], right[labels == label], count, eleven_points)
            for label, count in enumerate(self.objects.tolist())
        ]

    def compute(self) -> dict[str, Tensor]:
        values = {"map50_voc07": self.per_class(True), "map50_voc": self.per_class(False)}
        return {name: torch.tensor(each, device=self.device).nanmean() for name, each in values.items()}


def judged(found: dict[str, Tensor], boxes: Tensor, labels: Tensor, passed_over: Tensor, iou: float = 0.5) -> Tensor:
    """What each detection of one image is: 1 right, 0 wrong, -1 passed over.

    found: {"boxes" (n, 4), "labels" (n,), "scores" (n,)}; boxes (m, 4), labels (m,) of the objects; passed_over (m,)
    bool.
    """
    count = len(found["scores"])
    overlap = box_iou(found["boxes"].float(), boxes.float()) if count and len(boxes) else torch.zeros(count, len(boxes))
    overlap = torch.where(found["labels"][:, None] == labels, overlap.to(labels.device), -1.0)
    return outcomes(overlap, found["scores"], passed_over, iou)


def outcomes(overlap: Tensor, scores: Tensor, passed_over: Tensor, iou: float, strictly: bool = False) -> Tensor:
    """The same from IoUs (n, m), negative where classes differ. strictly: an IoU of just `iou` is too small."""
    count, objects = overlap.shape
    outcome = torch.full((count,), WRONG, device=overlap.device)
    if not count or not objects:
        return outcome
    best, place = overlap.max(1)
    rank = torch.empty_like(place)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(count, device=place.device)
    meets = best > iou if strictly else best >= iou
    rank_that_meets = torch.where(meets, rank, count)
    first = torch.full((objects,), count, device=place.device).scatter_reduce(0, place, rank_that_meets, "amin")
    outcome[meets & (rank == first[place])] = RIGHT
    outcome[meets & passed_over[place]] = PASSED_OVER
    return outcome


def voc_average_precision(scores: Tensor, right: Tensor, objects: int, eleven_points: bool) -> float:
    """AP of one class from its detections over all images: scores (n,), right (n,) bool; objects that there are. NaN
    where there are none."""
    if not objects:
        return torch.nan
    if not len(scores):
        return 0.0
    hits = right[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    recall = hits / objects
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    if eleven_points:
        levels = torch.arange(11, dtype=recall.dtype) / 10
        reached = recall >= levels[:, None] - 1e-9
        return float(torch.where(reached, precision, 0).amax(1).mean())
    return float((torch.diff(recall, prepend=recall.new_zeros(1)) * best_from_here).sum())


def flag(target: Mapping[str, Any], name: str) -> Tensor:
    """A target's flags as bool (m,), False where it has none."""
    given = target.get(name)
    return torch.zeros_like(target["labels"], dtype=torch.bool) if given is None else given.bool()
