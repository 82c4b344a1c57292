"""Mask R-CNN: boxes of proposed regions, and a mask in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.box_heads import BoxLayers, MaskLayers, ProposalHead
from deltalens.backbones.dense.detector_options import options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import (
    Detector,
    PyramidAnchors,
    RegionPooling,
    anchor_sizes,
    neck_of,
)
from deltalens.backbones.dense.region_options import RegionOptions

FINEST = 4  # stride of the finest map that is read
BACKGROUND = 1  # torchvision's class 0: ours are its classes 1 to K


@dataclass(frozen=True)
class MaskRCNNOptions(RegionOptions):
    """Beside `RegionOptions`. mask_convolutions, mask_width: of the mask's branch."""

    mask_convolutions: int = 4
    mask_width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_width < 1:
            raise ValueError(f"mask_width must be at least 1, got {self.mask_width}")


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
            rpn_head=ProposalHead(options.channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=options.proposals_train,
            rpn_pre_nms_top_n_test=options.proposals,
            rpn_post_nms_top_n_train=options.proposals_train,
            rpn_post_nms_top_n_test=options.proposals,
            rpn_nms_thresh=options.proposal_nms,
            rpn_batch_size_per_image=options.sampled_anchors,
            box_roi_pool=RegionPooling(pooled, 7, 2, options.canonical_scale),
            box_head=TwoMLPHead(options.channels * 7**2, options.box_width),
            box_predictor=BoxLayers(options.box_width, classes),
            box_score_thresh=options.score_threshold,
            box_nms_thresh=options.nms_threshold,
            box_detections_per_img=options.detections_per_image,
            box_batch_size_per_image=options.sampled_regions,
            mask_roi_pool=RegionPooling(pooled, 14, 2, options.canonical_scale),
            mask_head=MaskRCNNHeads(options.channels, widths, 1),
            mask_predictor=MaskLayers(([options.channels, *widths])[-1], options.mask_width, classes),
        )
        self._says(pyramid, num_classes, options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + BACKGROUND} for target in targets]
        output = super().forward(images, targets)
        if self.training:
            return output
        return [{**found, "labels": found["labels"] - BACKGROUND} for found in output]


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> MaskRCNNDetector:
    """A Mask R-CNN on a pyramid; options: fields of `MaskRCNNOptions`."""
    return MaskRCNNDetector(pyramid, num_classes, options_from(MaskRCNNOptions, "mask_rcnn", options))


def build(body: Body, num_classes: int, **options: Any) -> MaskRCNNDetector:
    """A Mask R-CNN on a backbone; options: fields of `MaskRCNNOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, MaskRCNNOptions, "mask_rcnn", options, FINEST)
    return MaskRCNNDetector(pyramid, num_classes, own)
