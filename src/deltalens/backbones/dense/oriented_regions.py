"""The second stage of Oriented R-CNN: classes and boxes of oriented regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from deltalens.backbones.dense.oriented_coder import OrientedCoder
from deltalens.backbones.dense.oriented_detections import LEAST_SIDE
from deltalens.backbones.dense.oriented_proposals import overlaps_image
from deltalens.backbones.dense.precision import InFullPrecision
from deltalens.models.oriented_iou import oriented_iou
from deltalens.models.oriented_nms import batched_oriented_nms
from deltalens.models.oriented_roi_align import oriented_roi_align

CANONICAL_LEVEL = 4  # stride 16
REGION_STDS = (0.1, 0.1, 0.2, 0.2, 0.1)


class OrientedRegionPooling(nn.Module):
    """Rotated RoIAlign from the level that fits a box's size, k = floor(4 + log2(sqrt(w h) / canonical_scale)).

        (maps of the levels, boxes (n_i, 5) of each image) -> (sum of n_i, C, output_size, output_size)

    The level has the stride 2^k; where there is none, it is the finest or the coarsest. It is torchvision's rule, and
    with a canonical scale of 224 and a finest stride of 4 mmdetection's with a finest scale of 56, too.
    `sampling_ratio`^2 points of each cell are averaged. Raises ValueError for strides that are no powers of two, side
    by side.
    """

    def __init__(self, strides: Sequence[int], output_size: int, sampling_ratio: int, canonical_scale: int):
        super().__init__()
        self.exponents = [stride.bit_length() - 1 for stride in strides]
        if [1 << self.exponents[0] + level for level in range(len(strides))] != list(strides):
            raise ValueError(f"regions are pooled from levels whose strides are powers of two, got {list(strides)}")
        self.output_size, self.sampling_ratio, self.canonical_scale = output_size, sampling_ratio, canonical_scale

    def levels_of(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 5) -> the numbers (n,) of their levels, from 0 for the finest."""
        sizes = (boxes[:, 2] * boxes[:, 3]).sqrt()
        exponents = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / self.canonical_scale) + 1e-6)
        return exponents.clamp(self.exponents[0], self.exponents[-1]).long() - self.exponents[0]

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        images = torch.cat([each.new_full((len(each), 1), image) for image, each in enumerate(boxes)])
        regions = torch.cat((images, torch.cat(boxes)), 1)
        levels = self.levels_of(regions[:, 1:])
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], self.output_size, self.output_size)
        for level, exponent in enumerate(self.exponents):
            here = torch.where(levels == level)[0]
            found = oriented_roi_align(
                maps[level], regions[here], self.output_size, 1 / (1 << exponent), self.sampling_ratio
            )
            pooled = pooled.index_put((here,), found.to(pooled.dtype))
        return pooled


class OrientedBoxLayers(InFullPrecision, FastRCNNPredictor):
    """Class logits, the background's first, and one change of the box for all classes. float32 comes out."""

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        self.bbox_pred = nn.Linear(width, 5)


class OrientedRegionHeads(nn.Module):
    """Proposals -> classes and boxes (Xie et al., 2021, section 3.2), with the settings of mmrotate.

        training: {"loss_classifier", "loss_box_reg"}
        eval:     for each image {"boxes" (n, 5) le90, "labels" (n,) from 1, "scores" (n,)}, best first

    In training the true boxes are put to the proposals. A region with an oriented IoU of 0.5 or more is of the object
    that it overlaps most, any other is background. Of each image `sampled` regions count, at most a quarter of them of
    objects. The losses are the cross-entropy and the smooth L1 loss (beta 1) of five numbers, the latter of regions of
    objects only; both are divided by the count of regions.

    In evaluation each region is a box of every class whose probability is above `score_thresh`; of these the best
    `candidates` of an image are looked at. Of boxes of one class with an oriented IoU above `nms_thresh` the better one
    stays. Boxes are not cut at the image's edges; those that lie outside of it entirely are dropped.
    """

    def __init__(
        self,
        pool: OrientedRegionPooling,
        head: nn.Module,
        predictor: nn.Module,
        sampled: int,
        score_thresh: float,
        nms_thresh: float,
        candidates: int,
        detections: int,
    ):
        super().__init__()
        self.box_roi_pool, self.box_head, self.box_predictor = pool, head, predictor
        self.box_coder = OrientedCoder(stds=REGION_STDS)
        self.matcher = Matcher(0.5, 0.5)
        self.sampler = BalancedPositiveNegativeSampler(sampled, 0.25)
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.candidates, self.detections = candidates, detections

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        maps = list(features.values())
        if not self.training:
            logits, deltas = self._predict(maps, proposals)
            return self._detections(logits, deltas, proposals, image_sizes), {}
        regions, labels, truth = self.sampled_regions(proposals, targets or [])
        logits, deltas = self._predict(maps, regions)
        wanted = self.box_coder.encode(torch.cat(truth), torch.cat(regions))
        return [], region_losses(logits, deltas, torch.cat(labels), wanted)

    def sampled_regions(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """For each image (regions (n, 5), labels (n,) with 0 for the background, the boxes (n, 5) they are to find).
        A region of the background is to find itself, which nobody reads."""
        regions, labels, truth = [], [], []
        for proposed, target in zip(proposals, targets, strict=True):
            boxes = target["boxes"].to(proposed.dtype)
            candidates = torch.cat((proposed, boxes))
            label, wanted = self.assign(candidates, boxes, target["labels"])
            positive, negative = self.sampler([label])
            kept = torch.where(positive[0] | negative[0])[0]
            regions.append(candidates[kept])
            labels.append(label[kept])
            truth.append(wanted[kept])
        return regions, labels, truth

    def assign(self, regions: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (n, 5), true boxes (m, 5) and their labels (m,) -> labels (n,), 0 for background, and the boxes
        (n, 5) that the regions are to find."""
        if not len(boxes):
            return labels.new_zeros(len(regions)), regions
        matched = self.matcher(oriented_iou(boxes, regions))
        found = matched.clamp(min=0)
        of_objects = matched >= 0
        return labels[found] * of_objects, torch.where(of_objects[:, None], boxes[found], regions)

    def _predict(self, maps: list[Tensor], regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(maps, regions)))

    def _detections(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        counts = [len(each) for each in proposals]
        decoded = self.box_coder.decode(deltas, torch.cat(proposals)).split(counts)
        probabilities = logits.softmax(-1).split(counts)
        found = []
        for boxes, scores, size in zip(decoded, probabilities, image_sizes, strict=True):
            inside = overlaps_image(boxes, size, LEAST_SIDE)
            boxes, scores = boxes[inside], scores[inside]
            region, label = torch.where(scores[:, 1:] > self.score_thresh)
            score, best = scores[region, label + 1].sort(descending=True, stable=True)
            score, region, label = (each[: self.candidates] for each in (score, region[best], label[best] + 1))
            kept = batched_oriented_nms(boxes[region], score, label, self.nms_thresh)[: self.detections]
            found.append({"boxes": boxes[region[kept]], "labels": label[kept], "scores": score[kept]})
        return found


def region_losses(logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Logits (n, 1 + K), changes (n, 5), labels (n,) with 0 for the background and changes wanted (n, 5) -> losses.
    Without any region both are 0."""
    count, of_objects = max(1, len(labels)), labels > 0
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
        "loss_box_reg": F.smooth_l1_loss(deltas[of_objects], wanted[of_objects], reduction="sum", beta=1.0) / count,
    }
