"""Cascade R-CNN and Cascade Mask R-CNN: regions that are refined stage by stage, each stage stricter than the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from deltalens.backbones.dense.aligned_pooling import region_pooling
from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.box_heads import REGION, BoxLayers, MaskLayers, ProposalHead, box_head
from deltalens.backbones.dense.cascade_heads import AVERAGES, CascadeHeads, Stage
from deltalens.backbones.dense.detector_options import options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import Detector, PyramidAnchors, anchor_sizes, neck_of
from deltalens.backbones.dense.mask_rcnn import MaskRCNNOptions
from deltalens.backbones.dense.region_losses import BOX_LOSSES, BoxLoss
from deltalens.backbones.dense.region_options import RegionOptions
from deltalens.backbones.dense.region_sampling import RegionSampler

FINEST = 4  # stride of the finest map that is read
BACKGROUND = 1  # torchvision's class 0: ours are its classes 1 to K


@dataclass(frozen=True)
class CascadeRCNNOptions(RegionOptions):
    """Beside `RegionOptions`. iou_thresholds: of each stage, the IoU from which a region belongs to an object; there
    are as many stages. box_stds: of each stage, the units (dx, dy, dw, dh) of the changes that it predicts.
    stage_weights: of each stage's losses. class_agnostic: one box for all classes, or one for each. box_head: "2fc" or
    "4conv1fc"; box_norm: of the latter's convolutions, "batch", "group" or None (`box_heads.box_head`). box_loss:
    smooth_l1, l1 or giou; box_loss_weight: its weight beside that of the classes; smooth_l1_beta: up to which
    smooth_l1 is quadratic (Mask R-CNN of torchvision has 1/9). average: the stages' "logits" or "probabilities" are
    averaged in evaluation. aligned, sampling_ratio: of the pooling of regions (`aligned_pooling`). rounded_anchors:
    corners of anchors as whole pixels, as in torchvision.

    With aligned=True, sampling_ratio=0 and rounded_anchors=False the network computes what mmdetection's does.
    """

    iou_thresholds: tuple[float, ...] = (0.5, 0.6, 0.7)
    box_stds: tuple[tuple[float, ...], ...] = (
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    class_agnostic: bool = True
    box_head: str = "2fc"
    box_norm: str | None = "batch"
    box_loss: str = "smooth_l1"
    box_loss_weight: float = 1.0
    smooth_l1_beta: float = 1.0
    average: str = "logits"
    aligned: bool = False
    sampling_ratio: int = 2
    rounded_anchors: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.iou_thresholds)
        if not stages or len(self.box_stds) != stages or len(self.stage_weights) != stages:
            raise ValueError(
                "iou_thresholds, box_stds and stage_weights have one entry for each stage; got "
                f"{stages}, {len(self.box_stds)} and {len(self.stage_weights)}"
            )
        if not all(0 < threshold <= 1 for threshold in self.iou_thresholds):
            raise ValueError(f"iou_thresholds lie above 0 and not above 1, got {self.iou_thresholds}")
        if any(len(stds) != 4 or min(stds) <= 0 for stds in self.box_stds):
            raise ValueError(f"box_stds are four positive numbers for each stage, got {self.box_stds}")
        if self.box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss must be one of {', '.join(BOX_LOSSES)}, got {self.box_loss!r}")
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {self.average!r}")
        if not self.smooth_l1_beta > 0:
            raise ValueError(f"smooth_l1_beta must be positive (box_loss='l1' has none), got {self.smooth_l1_beta}")


@dataclass(frozen=True)
class CascadeOptions(CascadeRCNNOptions, MaskRCNNOptions):
    """`CascadeRCNNOptions`, and the mask branch of `MaskRCNNOptions`, of which each stage has one."""


class CascadeDetector(Detector, GeneralizedRCNN):
    """Cascade R-CNN, with masks Cascade Mask R-CNN (`CascadeHeads`), on any pyramid and torchvision's proposals.

        training: model(list of (3, H, W), list of {"boxes", "labels", with masks "masks" (n, H, W) uint8})
                  -> {"loss_objectness", "loss_rpn_box_reg", "loss_classifier_1", "loss_box_reg_1", "loss_mask_1",
                  "loss_classifier_2", ...}, weighted
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 4) xyxy pixels, "labels" (n,) from 0, "scores" (n,),
                  with masks "masks" (n, 1, H, W) probabilities}

    Masks come with `CascadeOptions`; `CascadeRCNNOptions` has none. Labels count from 0 outside; inside, class 0 is the
    background. One stage with class_agnostic=False and smooth_l1_beta=1/9 is `MaskRCNNDetector`.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: CascadeRCNNOptions):
        neck = neck_of(pyramid, options, FINEST, "pool")
        pooled, classes = neck.strides[:-1], num_classes + BACKGROUND
        with_masks = isinstance(options, CascadeOptions)
        pooling = (options.sampling_ratio, options.canonical_scale, options.aligned)
        stages = [
            Stage(
                box_head(options.box_head, options.channels, options.box_width, options.box_norm),
                BoxLayers(options.box_width, classes, options.class_agnostic),
                _mask_layers(options, classes) if isinstance(options, CascadeOptions) else None,
                RegionSampler(threshold, options.sampled_regions),
                stds,
                weight,
            )
            for threshold, stds, weight in zip(
                options.iou_thresholds, options.box_stds, options.stage_weights, strict=True
            )
        ]
        heads = CascadeHeads(
            stages,
            region_pooling(pooled, REGION, *pooling),
            region_pooling(pooled, 2 * REGION, *pooling) if with_masks else None,
            BoxLoss(options.box_loss, options.box_loss_weight, options.smooth_l1_beta),
            options.score_threshold,
            options.nms_threshold,
            options.detections_per_image,
            options.average,
        )
        super().__init__(neck, _proposals(neck.strides, options), heads, None)
        self._says(pyramid, num_classes, options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + BACKGROUND} for target in targets]
        output = super().forward(images, targets)
        if self.training:
            return output
        return [{**found, "labels": found["labels"] - BACKGROUND} for found in output]


class _ExactAnchors(PyramidAnchors):
    """Anchors whose corners are not rounded."""

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)[None, :]
        width, height = (sizes / heights).flatten(), (sizes * heights).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2


def _proposals(strides: list[int], options: CascadeRCNNOptions) -> RegionProposalNetwork:
    sizes = anchor_sizes(options.anchor_sizes, strides, [options.anchor_scale])
    kind = PyramidAnchors if options.rounded_anchors else _ExactAnchors
    anchors = kind(sizes, [options.anchor_ratios] * len(strides), strides)
    counts = {"training": options.proposals_train, "testing": options.proposals}
    return RegionProposalNetwork(
        anchors,
        ProposalHead(options.channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.sampled_anchors,
        positive_fraction=0.5,
        pre_nms_top_n=counts,
        post_nms_top_n=counts,
        nms_thresh=options.proposal_nms,
    )


def _mask_layers(options: CascadeOptions, classes: int) -> tuple[nn.Module, nn.Module]:
    widths = [options.mask_width] * options.mask_convolutions
    last = [options.channels, *widths][-1]
    return MaskRCNNHeads(options.channels, widths, 1), MaskLayers(last, options.mask_width, classes)


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> CascadeDetector:
    """A Cascade Mask R-CNN on a pyramid; options: fields of `CascadeOptions`."""
    return CascadeDetector(pyramid, num_classes, options_from(CascadeOptions, "cascade", options))


def boxes_on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> CascadeDetector:
    """A Cascade R-CNN without masks on a pyramid; options: fields of `CascadeRCNNOptions`."""
    return CascadeDetector(pyramid, num_classes, options_from(CascadeRCNNOptions, "cascade_rcnn", options))


def build(body: Body, num_classes: int, **options: Any) -> CascadeDetector:
    """A Cascade Mask R-CNN on a backbone; options: fields of `CascadeOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, CascadeOptions, "cascade", options, FINEST)
    return CascadeDetector(pyramid, num_classes, own)


def build_boxes(body: Body, num_classes: int, **options: Any) -> CascadeDetector:
    """A Cascade R-CNN without masks on a backbone; options: fields of `CascadeRCNNOptions`, and those of
    `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, CascadeRCNNOptions, "cascade_rcnn", options, FINEST)
    return CascadeDetector(pyramid, num_classes, own)
