"""The stages of a cascade: each judges regions and refines them for the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

from deltalens.backbones.dense.region_losses import BoxLoss, class_loss, of_class
from deltalens.backbones.dense.region_sampling import POSITIVE_SHARE, RegionSampler

Sizes = list[tuple[int, int]]
AVERAGES = ("logits", "probabilities")


class Stage(nn.Module):
    """One stage: features of regions -> (class logits (n, classes), box changes (n, 4) or (n, 4 classes)).

    box_head, box_predictor: its layers. mask_layers: the same two of masks, or None. sampler: which regions it is
    trained on. stds: the units of the changes (dx, dy, dw, dh) that its layers give. loss_weight: of all its losses.
    """

    def __init__(
        self,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_layers: tuple[nn.Module, nn.Module] | None,
        sampler: RegionSampler,
        stds: Sequence[float],
        loss_weight: float,
    ):
        super().__init__()
        self.box_head, self.box_predictor = box_head, box_predictor
        if mask_layers is not None:
            self.mask_head, self.mask_predictor = mask_layers
        self.sampler, self.loss_weight = sampler, loss_weight
        self.coder = BoxCoder(tuple(1 / std for std in stds))  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(features))

    def masks(self, features: Tensor) -> Tensor:
        """Features of regions -> mask logits (n, classes, H, W)."""
        return self.mask_predictor(self.mask_head(features))

    @torch.no_grad()
    def refined(
        self, boxes: list[Tensor], logits: Tensor, changes: Tensor, sizes: Sizes, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Regions moved as the stage says, and clipped to their images. Without gradient: the next stage takes them as
        given. Where each class has changes of its own, a region takes those of its label, and background (and all,
        without labels) those of the likeliest class."""
        likeliest = logits[:, 1:].argmax(1) + 1
        classes = likeliest if labels is None else torch.where(labels > 0, labels, likeliest)
        moved = self.coder.decode_single(of_class(changes, classes), torch.cat(boxes))
        split = moved.split([len(each) for each in boxes])
        return [clip_boxes_to_image(each, size) for each, size in zip(split, sizes, strict=True)]


class CascadeHeads(RoIHeads):
    """The heads of Cascade R-CNN (Cai & Vasconcelos, 2018, arXiv 1712.00726; with masks 2019, arXiv 1906.09756).

        b_0 = proposals;   b_t = clip(decode_t(regressor_t(pool(b_{t-1})), b_{t-1}))

    In training every stage samples its own regions, judges them by its own IoU threshold, and hands on what it made of
    them, without gradient. The objects' own boxes are among the regions of every stage; those that a stage was given
    are not handed on, and the next stage gets them anew, as in mmdetection.
    In evaluation each stage judges its own input boxes; their judgements are averaged (`average`: logits, as in
    mmdetection, or probabilities, as in detectron2), the boxes are those of the last stage. Each stage's mask head sees
    the boxes that were found; their probabilities are averaged.

    Losses: "loss_classifier_1", "loss_box_reg_1" and, with masks, "loss_mask_1" of the first stage and so on, times the
    stage's weight.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        box_roi_pool: nn.Module,
        mask_roi_pool: nn.Module | None,
        box_loss: BoxLoss,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        average: str = "logits",
    ):
        last = stages[-1]  # of which torchvision's own code reads the coder, and nothing else, when boxes are decoded
        super().__init__(
            box_roi_pool,
            None,
            None,
            0.5,
            0.5,
            1,
            POSITIVE_SHARE,
            last.coder.weights,
            score_threshold,
            nms_threshold,
            detections_per_image,
        )
        self.stages = nn.ModuleList(stages)
        self.mask_roi_pool = mask_roi_pool
        self.box_loss, self.average = box_loss, average

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """(what was found in each image, {}) in evaluation, ([], losses) in training."""
        if not self.training:
            return self._found(features, proposals, image_shapes), {}
        if targets is None:
            raise ValueError("in training the network needs targets: model(images, targets)")
        needed = ["boxes", "labels", *([] if self.mask_roi_pool is None else ["masks"])]
        absent = [name for name in needed if any(name not in target for target in targets)]
        if absent:
            raise ValueError(f"every target needs {', '.join(needed)}, and one has no {absent[0]}")
        return [], self._losses(features, proposals, image_shapes, targets)

    def _losses(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages, 1):
            regions = stage.sampler(boxes, targets)
            logits, changes = stage(self.box_roi_pool(features, regions.boxes, sizes))
            own = {"classifier": class_loss(logits, regions), "box_reg": self.box_loss(changes, regions, stage.coder)}
            if self.mask_roi_pool is not None:
                objects = [labels > 0 for labels in regions.labels]
                of_objects = [each[rows] for each, rows in zip(regions.boxes, objects, strict=True)]
                matched = [each[rows] for each, rows in zip(regions.matched, objects, strict=True)]
                masks = stage.masks(self.mask_roi_pool(features, of_objects, sizes))
                truth, labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
                own["mask"] = maskrcnn_loss(masks, of_objects, truth, labels, matched)
            losses |= {f"loss_{name}_{number}": stage.loss_weight * loss for name, loss in own.items()}
            moved = stage.refined(regions.boxes, logits, changes, sizes, torch.cat(regions.labels))
            boxes = [each[~added] for each, added in zip(moved, regions.added, strict=True)]
        return losses

    def _found(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        judgements: list[Tensor] = []
        refined = boxes
        for stage in self.stages:
            boxes = refined
            logits, changes = stage(self.box_roi_pool(features, boxes, sizes))
            judgements.append(logits)
            refined = stage.refined(boxes, logits, changes, sizes)
        logits = averaged(judgements, self.average)
        if changes.shape[1] == 4:
            changes = changes.repeat(1, logits.shape[1])
        found_boxes, scores, labels = self.postprocess_detections(logits, changes, boxes, sizes)
        names = ("boxes", "labels", "scores")
        found = [dict(zip(names, each, strict=True)) for each in zip(found_boxes, labels, scores, strict=True)]
        if self.mask_roi_pool is not None:
            pooled = self.mask_roi_pool(features, found_boxes, sizes)
            views = [maskrcnn_inference(stage.masks(pooled), labels) for stage in self.stages]
            for each, *masks in zip(found, *views, strict=True):
                each["masks"] = torch.stack(masks).mean(0)
        return found


def averaged(logits: Sequence[Tensor], of: str) -> Tensor:
    """Logits (n, classes) of several stages -> those whose softmax is the softmax of the mean logits ("logits"), or the
    mean of the softmaxes ("probabilities")."""
    stacked = torch.stack(list(logits))
    if of == "logits":
        return stacked.mean(0)
    return stacked.log_softmax(-1).logsumexp(0) - math.log(len(stacked))
