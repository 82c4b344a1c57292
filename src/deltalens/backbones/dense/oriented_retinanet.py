"""RetinaNet with oriented boxes: five numbers an anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead, RetinaNetRegressionHead

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import Detector, neck_of
from deltalens.backbones.dense.oriented_anchors import OrientedAnchors, upright_as_oriented
from deltalens.backbones.dense.oriented_batch import OrientedBatch
from deltalens.backbones.dense.oriented_coder import OrientedCoder
from deltalens.backbones.dense.oriented_detections import (
    candidates,
    checked_targets,
    without_doubles,
)
from deltalens.backbones.dense.oriented_losses import BOX_LOSSES
from deltalens.backbones.dense.oriented_matching import match
from deltalens.backbones.dense.precision import InFullPrecision
from deltalens.backbones.dense.retinanet import (
    FINEST,
    RetinaNetOptions,
    anchor_shapes,
    norm_of,
    start_as_published,
)
from deltalens.models.oriented_boxes import Convention, enclosing

MATCHINGS = ("oriented", "upright")


@dataclass(frozen=True)
class OrientedRetinaNetOptions(RetinaNetOptions):
    """Beside `RetinaNetOptions`, of which some defaults are mmrotate's: nms_threshold 0.1, up to 2000 detections an
    image, 2000 candidates a level.

    box_loss: l1 or smooth_l1 of the codes; kld, gwd (distances of Gaussians) or iou of the boxes themselves (see
    `oriented_losses`). box_weight: its factor. matching: anchors are matched by their IoU with the oriented boxes
    ("oriented", mmrotate's RetinaNet-OBB) or with the upright boxes around them ("upright", its RetinaNet-HBB, which
    Mona's KLD setting on STAR has). foreground_iou, background_iou: see `oriented_matching.match`. edge_swap,
    convention, norm_factor: of the `OrientedCoder`; the convention matters without edge_swap only.
    """

    box_losses: ClassVar[tuple[str, ...]] = tuple(BOX_LOSSES)

    nms_threshold: float = 0.1
    detections_per_image: int = 2000
    candidates: int = 2000
    box_weight: float = 1.0
    matching: str = "oriented"
    foreground_iou: float = 0.5
    background_iou: float = 0.4
    edge_swap: bool = True
    convention: Convention = "le90"
    norm_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {self.matching!r}")
        if not 0 <= self.background_iou <= self.foreground_iou <= 1:
            raise ValueError(
                "background_iou and foreground_iou must lie between 0 and 1, in this order, got "
                f"{self.background_iou} and {self.foreground_iou}"
            )
        if not self.box_weight >= 0:
            raise ValueError(f"box_weight must not be negative, got {self.box_weight}")
        self.coder()

    def coder(self) -> OrientedCoder:
        """The coder that these options ask for."""
        return OrientedCoder(edge_swap=self.edge_swap, convention=self.convention, norm_factor=self.norm_factor)


class OrientedRetinaNet(Detector, nn.Module):
    """RetinaNet (Lin et al., 2017, arXiv 1708.02002) whose anchors find oriented boxes, on any pyramid.

        training: model(list of (3, H, W), list of {"boxes" (n, 5), "labels"}) -> {"classification", "bbox_regression"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 5) in le90, "labels" (n,) from 0, "scores" (n,)}

    Boxes are (cx, cy, w, h, angle), pixels and radians. As mmrotate's rotated RetinaNet in le90: the maps with strides
    8 to 32, an FPN with P6 and P7, 9 upright anchors a cell, `OrientedCoder`, focal loss (alpha 0.25, gamma 2) and L1,
    `batched_oriented_nms` class by class.

    What differs: as in our RetinaNet, losses are divided by the number of foreground anchors of each image, then
    averaged over images (mmrotate: by that of the batch; its Gaussian losses by the number of their anchors, which is
    the same). Anchors are matched as `oriented_matching.match` says. Sizes of anchors are whole pixels, as in
    torchvision. Boxes are not moved into the image: one that sticks out stays whole, one outside of it is dropped.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: OrientedRetinaNetOptions):
        super().__init__()
        self.backbone = neck_of(pyramid, options, FINEST, options.extra_levels)
        strides = self.backbone.strides
        self.anchor_generator = OrientedAnchors(*anchor_shapes(options, strides), strides)
        anchors = self.anchor_generator.num_anchors_per_location()[0]
        self.head = OrientedRetinaNetHead(options.channels, anchors, num_classes, norm_of(options), options)
        self.options = options
        self.score_thresh = options.score_threshold
        self._says(pyramid, num_classes, options)
        self.transform = OrientedBatch(options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if self.training:
            targets = checked_targets(targets)
        batch, targets = self.transform(images, targets if self.training else None)
        maps = list(self.backbone(batch.tensors).values())
        output, anchors = self.head(maps), self.anchor_generator(batch, maps)[0]
        if self.training:
            matched = [self._match(target["boxes"], anchors) for target in targets]
            return self.head.compute_loss(targets, output, [anchors] * len(targets), matched)
        sizes = [level.shape[-2] * level.shape[-1] for level in maps]
        counts = [size * each for size, each in zip(sizes, self._anchors_per_cell(), strict=True)]
        split = [output["cls_logits"].split(counts, 1), output["bbox_regression"].split(counts, 1)]
        found = [
            self._detections(
                [level[index] for level in split[0]], [level[index] for level in split[1]], anchors.split(counts), size
            )
            for index, size in enumerate(batch.image_sizes)
        ]
        return self.transform.postprocess(found, batch.image_sizes, [tuple(image.shape[-2:]) for image in images])

    def _anchors_per_cell(self) -> list[int]:
        return self.anchor_generator.num_anchors_per_location()

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        if self.options.matching == "upright":
            boxes = upright_as_oriented(enclosing(boxes))
        return match(boxes, anchors, self.options.foreground_iou, self.options.background_iou)

    def _detections(
        self, logits: list[Tensor], codes: list[Tensor], anchors: tuple[Tensor, ...], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        boxes, scores, labels = [], [], []
        for level_logits, level_codes, level_anchors in zip(logits, codes, anchors, strict=True):
            best, rows, classes = candidates(level_logits.sigmoid(), self.score_thresh, self.options.candidates)
            boxes.append(self.head.coder.decode(level_codes[rows], level_anchors[rows]))
            scores.append(best)
            labels.append(classes)
        return without_doubles(
            torch.cat(boxes),
            torch.cat(scores),
            torch.cat(labels),
            size,
            self.options.nms_threshold,
            self.options.detections_per_image,
        )


class OrientedRegression(RetinaNetRegressionHead):
    """Five numbers for each anchor: (B, H W A, 5)."""

    def __init__(
        self, channels: int, anchors: int, norm: Callable[..., nn.Module] | None, options: OrientedRetinaNetOptions
    ):
        super().__init__(channels, anchors, norm)
        self.bbox_reg = nn.Conv2d(channels, anchors * 5, kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        nn.init.zeros_(self.bbox_reg.bias)
        self.loss, self.weight, self.coder = BOX_LOSSES[options.box_loss], options.box_weight, options.coder()

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [self.bbox_reg(self.conv(each)) for each in maps]
        return torch.cat([each.unflatten(1, (-1, 5)).permute(0, 3, 4, 1, 2).flatten(1, 3) for each in levels], 1)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> Tensor:
        losses = []
        for target, codes, own, matched in zip(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs, strict=True
        ):
            rows = (matched >= 0).nonzero()[:, 0]
            boxes = target["boxes"][matched[rows]].to(codes.dtype)
            losses.append(self.loss(self.coder, codes[rows], own[rows], boxes).sum() / max(1, len(rows)))
        return self.weight * torch.stack(losses).mean()


class OrientedRetinaNetHead(InFullPrecision, RetinaNetHead):
    """Logits and codes in float32, of two towers of convolutions that start as those of our RetinaNet."""

    def __init__(
        self,
        channels: int,
        anchors: int,
        num_classes: int,
        norm: Callable[..., nn.Module] | None,
        options: OrientedRetinaNetOptions,
    ):
        super().__init__(channels, anchors, num_classes, norm)
        self.regression_head = OrientedRegression(channels, anchors, norm, options)
        if norm is None:
            start_as_published(self, channels)

    @property
    def coder(self) -> OrientedCoder:
        return self.regression_head.coder


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> OrientedRetinaNet:
    """An oriented RetinaNet on a pyramid; options: fields of `OrientedRetinaNetOptions`."""
    return OrientedRetinaNet(
        pyramid, num_classes, options_from(OrientedRetinaNetOptions, "oriented_retinanet", options)
    )


def build(body: Body, num_classes: int, **options: Any) -> OrientedRetinaNet:
    """An oriented RetinaNet on a backbone; options: fields of `OrientedRetinaNetOptions`, and those of
    `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, OrientedRetinaNetOptions, "oriented_retinanet", options, FINEST)
    return OrientedRetinaNet(pyramid, num_classes, own)
