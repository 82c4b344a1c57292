"""FCOS: a box from every cell, without anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models.detection.fcos import FCOS, FCOSHead

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import (
    DetectorOptions,
    norm_groups,
    options_from,
    pyramid_and_options,
)
from deltalens.backbones.dense.detector_parts import Detector, PyramidAnchors, neck_of
from deltalens.backbones.dense.precision import InFullPrecision

FINEST = 8  # stride of the finest map that is read


@dataclass(frozen=True)
class FCOSOptions(DetectorOptions):
    """Beside `DetectorOptions`, where channels must be a multiple of 32 (group norms of 32 groups, of 32
    channels 16). center_radius: cells
    whose centre lies within so many strides of a box's centre are its own. convolutions: in each branch of the head.
    candidates: so many of each level go into the suppression of doubles. extra_levels: P6 is computed from P5
    ("output", as published) or from the backbone's map ("input").

    A detection's score is the square root of class probability times centre-ness, whence the larger threshold.
    """

    score_threshold: float = 0.2
    nms_threshold: float = 0.6
    center_radius: float = 1.5
    convolutions: int = 4
    candidates: int = 1000
    extra_levels: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % 32:
            raise ValueError(
                f"FCOS has group norms of 32 groups: channels must be a multiple of 32, got {self.channels}"
            )
        if not self.center_radius > 0:
            raise ValueError(f"center_radius must be positive, got {self.center_radius}")


class FCOSDetector(Detector, FCOS):
    """torchvision's FCOS (Tian et al., 2019, arXiv 1904.01355; centre sampling and GIoU of 2006.09214) on any pyramid.

        training: model(list of (3, H, W), list of {"boxes", "labels"})
                  -> {"classification", "bbox_regression", "bbox_ctrness"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 4) xyxy pixels, "labels" (n,) from 0, "scores" (n,)}

    By default the maps with strides 8 to 32, an FPN with P6 and P7. Cell (i, j) of a level with stride s speaks for the
    point ((j + 1/2) s, (i + 1/2) s), as published; torchvision takes its upper left corner. Losses are divided by the
    foreground cells of the batch; as torchvision has it, the box loss does not weigh cells by their centre-ness, which
    the authors' code does.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: FCOSOptions):
        neck = neck_of(pyramid, options, FINEST, options.extra_levels)
        cells = PyramidAnchors([(s,) for s in neck.strides], [(1.0,)] * len(neck.strides), neck.strides, offset=0.5)
        super().__init__(
            neck,
            num_classes,
            anchor_generator=cells,
            head=_Head(options.channels, 1, num_classes, options.convolutions),
            center_sampling_radius=options.center_radius,
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold,
            detections_per_img=options.detections_per_image,
            topk_candidates=options.candidates,
        )
        self._says(pyramid, num_classes, options)


class _Head(InFullPrecision, FCOSHead):
    """Logits, distances and centre-ness in float32."""

    def __init__(self, channels: int, anchors: int, num_classes: int, convolutions: int):
        super().__init__(channels, anchors, num_classes, convolutions)
        for norm in (each for each in self.modules() if isinstance(each, nn.GroupNorm)):
            norm.num_groups = norm_groups(channels)


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> FCOSDetector:
    """An FCOS on a pyramid; options: fields of `FCOSOptions`."""
    return FCOSDetector(pyramid, num_classes, options_from(FCOSOptions, "fcos", options))


def build(body: Body, num_classes: int, **options: Any) -> FCOSDetector:
    """An FCOS on a backbone; options: fields of `FCOSOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, FCOSOptions, "fcos", options, FINEST)
    return FCOSDetector(pyramid, num_classes, own)
