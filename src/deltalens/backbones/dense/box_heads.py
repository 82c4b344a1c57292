"""The layers that judge a region: behind its features, and those that give logits, box changes and masks."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from deltalens.backbones.dense.detector_options import norm_groups
from deltalens.backbones.dense.precision import InFullPrecision

REGION = 7  # cells along a side of a pooled region
KINDS = ("2fc", "4conv1fc")
NORMS = ("batch", "group", None)


def box_head(kind: str, channels: int, width: int, norm: str | None) -> nn.Module:
    """Features of regions (n, channels, 7, 7) -> (n, width). ValueError for an unknown kind or norm.

    "2fc": two linear layers, each with a ReLU. "4conv1fc": four 3x3 convolutions, each with a norm and a ReLU, then
    one linear layer with a ReLU. norm, of the convolutions: "batch" (the published one is synchronised over devices;
    this one is of the device's own regions, unless the network was converted by
    `nn.SyncBatchNorm.convert_sync_batchnorm`), "group" or None.
    """
    if kind not in KINDS:
        raise ValueError(f"box_head must be one of {', '.join(KINDS)}, got {kind!r}")
    if norm not in NORMS:
        raise ValueError(f"box_norm must be 'batch', 'group' or None, got {norm!r}")
    if kind == "2fc":
        return TwoMLPHead(channels * REGION**2, width)
    return FastRCNNConvFCHead((channels, REGION, REGION), [channels] * 4, [width], _norm_layer(norm, channels))


def _norm_layer(norm: str | None, channels: int) -> Callable[..., nn.Module] | None:
    if norm == "group":
        return functools.partial(nn.GroupNorm, norm_groups(channels))
    return nn.BatchNorm2d if norm == "batch" else None


class ProposalHead(InFullPrecision, RPNHead):
    """Objectness and box changes in float32."""


class BoxLayers(InFullPrecision, FastRCNNPredictor):
    """Class logits (n, classes) and box changes (n, 4 classes), of all classes together (n, 4), in float32. classes:
    with the background."""

    def __init__(self, width: int, classes: int, class_agnostic: bool = False):
        super().__init__(width, classes)
        if class_agnostic:
            self.bbox_pred = nn.Linear(width, 4)


class MaskLayers(InFullPrecision, MaskRCNNPredictor):
    """Mask logits in float32."""
