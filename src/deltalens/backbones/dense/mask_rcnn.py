"""Mask R-CNN: boxes of proposed regions, and a mask in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import DetectorOptions, options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import (
    Detector,
    PyramidAnchors,
    RegionPooling,
    anchor_sizes,
    neck_of,
)
from deltalens.backbones.dense.precision import InFullPrecision

FINEST = 4  # stride of the finest map that is read
BACKGROUND = 1  # torchvision's class 0: ours are its classes 1 to K


@dataclass(frozen=True)
class MaskRCNNOptions(DetectorOptions):
    """Beside `DetectorOptions`. anchor_scale: anchors of a level are anchor_scale x stride (8 as published, 4 or less
    for objects that are small in the input). anchor_sizes: or name the sizes (pixels) of every level, which are the
    levels read and one more. anchor_ratios: height / width. proposals, proposals_train: regions that are looked at in
    evaluation and in training. proposal_nms: the IoU above which the worse of two proposals is dropped.
    sampled_anchors, sampled_regions: so many of each image go into the losses. canonical_scale: boxes of this size
    (pixels) are pooled from the level of stride 16. box_width: of the two layers behind a box's features.
    mask_convolutions, mask_width: of the mask's branch.
    """

    anchor_scale: float = 8.0
    anchor_sizes: tuple[tuple[float, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals: int = 1000
    proposals_train: int = 2000
    proposal_nms: float = 0.7
    sampled_anchors: int = 256
    sampled_regions: int = 512
    canonical_scale: int = 224
    box_width: int = 1024
    mask_convolutions: int = 4
    mask_width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.anchor_scale > 0 or not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise ValueError("anchor_scale and anchor_ratios must be positive")
        for name in ("proposals", "proposals_train", "sampled_anchors", "sampled_regions", "box_width", "mask_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.proposal_nms <= 1:
            raise ValueError(f"proposal_nms must lie above 0 and not above 1, got {self.proposal_nms}")


class MaskRCNNDetector(Detector, MaskRCNN):
    """torchvision's Mask R-CNN (He et al., 2017, arXiv 1703.06870) on any pyramid.

        training: model(list of (3, H, W), list of {"boxes", "labels", "masks" (n, H, W) uint8})
                  -> {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 4) xyxy pixels, "labels" (n,) from 0, "scores" (n,),
                  "masks" (n, 1, H, W) probabilities}

    By default the maps with strides 4 to 32 and one pooled level for proposals. Labels count from 0 outside; inside,
    torchvision's class 0 is the background.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: MaskRCNNOptions):
        neck = neck_of(pyramid, options, FINEST, "pool")
        strides, pooled = neck.strides, neck.strides[:-1]
        sizes = anchor_sizes(options.anchor_sizes, strides, [options.anchor_scale])
        ratios = [options.anchor_ratios] * len(strides)
        anchors = PyramidAnchors(sizes, ratios, strides)
        widths = [options.mask_width] * options.mask_convolutions
        classes = num_classes + BACKGROUND
        super().__init__(
            neck,
            rpn_anchor_generator=anchors,
            rpn_head=_ProposalHead(options.channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=options.proposals_train,
            rpn_pre_nms_top_n_test=options.proposals,
            rpn_post_nms_top_n_train=options.proposals_train,
            rpn_post_nms_top_n_test=options.proposals,
            rpn_nms_thresh=options.proposal_nms,
            rpn_batch_size_per_image=options.sampled_anchors,
            box_roi_pool=RegionPooling(pooled, 7, 2, options.canonical_scale),
            box_head=TwoMLPHead(options.channels * 7**2, options.box_width),
            box_predictor=_BoxLayers(options.box_width, classes),
            box_score_thresh=options.score_threshold,
            box_nms_thresh=options.nms_threshold,
            box_detections_per_img=options.detections_per_image,
            box_batch_size_per_image=options.sampled_regions,
            mask_roi_pool=RegionPooling(pooled, 14, 2, options.canonical_scale),
            mask_head=MaskRCNNHeads(options.channels, widths, 1),
            mask_predictor=_MaskLayers(([options.channels, *widths])[-1], options.mask_width, classes),
        )
        self._says(pyramid, num_classes, options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + BACKGROUND} for target in targets]
        output = super().forward(images, targets)
        if self.training:
            return output
        return [{**found, "labels": found["labels"] - BACKGROUND} for found in output]


class _ProposalHead(InFullPrecision, RPNHead):
    """Objectness and box changes in float32."""


class _BoxLayers(InFullPrecision, FastRCNNPredictor):
    """Class logits and box changes in float32."""


class _MaskLayers(InFullPrecision, MaskRCNNPredictor):
    """Mask logits in float32."""


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> MaskRCNNDetector:
    """A Mask R-CNN on a pyramid; options: fields of `MaskRCNNOptions`."""
    return MaskRCNNDetector(pyramid, num_classes, options_from(MaskRCNNOptions, "mask_rcnn", options))


def build(body: Body, num_classes: int, **options: Any) -> MaskRCNNDetector:
    """A Mask R-CNN on a backbone; options: fields of `MaskRCNNOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, MaskRCNNOptions, "mask_rcnn", options, FINEST)
    return MaskRCNNDetector(pyramid, num_classes, own)
