"""Oriented R-CNN: oriented boxes of proposed oriented regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import Detector, PyramidAnchors, anchor_sizes, neck_of
from deltalens.backbones.dense.oriented_batch import OrientedBatch
from deltalens.backbones.dense.oriented_proposals import OrientedProposalHead, OrientedProposals
from deltalens.backbones.dense.oriented_regions import OrientedBoxLayers, OrientedRegionHeads, OrientedRegionPooling
from deltalens.backbones.dense.precision import full_precision
from deltalens.backbones.dense.region_options import RegionOptions
from deltalens.models.oriented_boxes import as_convention

FINEST = 4  # stride of the finest map that is read
BACKGROUND = 1  # class 0 within: ours are the classes 1 to K
POOLED = 7  # cells a side of a region


@dataclass(frozen=True)
class OrientedRCNNOptions(RegionOptions):
    """Beside `RegionOptions`, of which IoUs are oriented ones but for proposal_nms, which compares the upright boxes
    around proposals. candidates: so many classes of regions, the best of an image, go into the suppression of doubles.

    The defaults are the settings of mmrotate's Oriented R-CNN on DOTA.
    """

    nms_threshold: float = 0.1
    detections_per_image: int = 2000
    proposals: int = 2000
    proposal_nms: float = 0.8
    candidates: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")


class OrientedRCNNDetector(Detector, nn.Module):
    """Oriented R-CNN (Xie et al., ICCV 2021, arXiv 2108.05699) on any pyramid.

        training: model(list of (3, H, W), list of {"boxes" (n, 5), "labels" (n,)})
                  -> {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 5), "labels" (n,) from 0, "scores" (n,)}

    Boxes are (cx, cy, w, h, angle) in pixels and radians, clockwise on the screen; found ones are in le90, those of
    targets in any convention. Proposals: `OrientedProposals`; regions: `OrientedRegionHeads`. By default the maps with
    strides 4 to 32 and one pooled level for proposals. Boxes, IoUs and losses are float32.

    Raises ValueError for targets whose boxes are not (n, 5), or have a side of 0, or numbers that are not finite.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: OrientedRCNNOptions):
        super().__init__()
        neck = neck_of(pyramid, options, FINEST, "pool")
        strides, pooled = neck.strides, neck.strides[:-1]
        sizes = anchor_sizes(options.anchor_sizes, strides, [options.anchor_scale])
        anchors = PyramidAnchors(sizes, [options.anchor_ratios] * len(strides), strides)
        self.backbone = neck
        self.rpn = OrientedProposals(
            anchors,
            OrientedProposalHead(options.channels, anchors.num_anchors_per_location()[0]),
            {"training": options.proposals_train, "testing": options.proposals},
            options.proposal_nms,
            options.sampled_anchors,
        )
        self.roi_heads = OrientedRegionHeads(
            OrientedRegionPooling(pooled, POOLED, 2, options.canonical_scale),
            TwoMLPHead(options.channels * POOLED**2, options.box_width),
            OrientedBoxLayers(options.box_width, num_classes + BACKGROUND),
            options.sampled_regions,
            options.score_threshold,
            options.nms_threshold,
            options.candidates,
            options.detections_per_image,
        )
        self._says(pyramid, num_classes, options)
        self.transform = OrientedBatch(options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if not self.training:
            targets = None
        elif targets is None:
            raise ValueError("in training the network needs targets, a list of {'boxes', 'labels'}")
        else:
            targets = [_inner(target) for target in targets]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        maps = self.backbone(batch.tensors)
        proposals, losses = self.rpn(batch, maps, targets)
        pooled = dict(list(maps.items())[:-1])
        found, more = self.roi_heads(pooled, proposals, batch.image_sizes, targets)
        if self.training:
            return {**losses, **more}
        found = self.transform.postprocess(found, batch.image_sizes, sizes)
        return [{**each, "labels": each["labels"] - BACKGROUND} for each in found]


def _inner(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boxes in le90 and in float32 at least, labels from 1. ValueError for boxes that cannot be learnt."""
    boxes = full_precision(target["boxes"])
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"targets of oriented boxes are (n, 5), (cx, cy, w, h, angle), got {tuple(boxes.shape)}")
    wrong = ~(boxes.isfinite().all(1) & (boxes[:, 2:4] > 0).all(1))
    if wrong.any():
        row = [round(value, 3) for value in boxes[wrong][0].tolist()]
        raise ValueError(f"a box of a target has no area or is not finite: {row}; leave such boxes out")
    return {"boxes": as_convention(boxes, "le90"), "labels": target["labels"] + BACKGROUND}


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> OrientedRCNNDetector:
    """An Oriented R-CNN on a pyramid; options: fields of `OrientedRCNNOptions`."""
    return OrientedRCNNDetector(pyramid, num_classes, options_from(OrientedRCNNOptions, "oriented_rcnn", options))


def build(body: Body, num_classes: int, **options: Any) -> OrientedRCNNDetector:
    """An Oriented R-CNN on a backbone; options: fields of `OrientedRCNNOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, OrientedRCNNOptions, "oriented_rcnn", options, FINEST)
    return OrientedRCNNDetector(pyramid, num_classes, own)
