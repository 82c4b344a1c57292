"""RetinaNet: dense classification and regression of anchor boxes, with the focal loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import (
    DetectorOptions,
    norm_groups,
    options_from,
    pyramid_and_options,
)
from deltalens.backbones.dense.detector_parts import Detector, PyramidAnchors, anchor_sizes, neck_of
from deltalens.backbones.dense.precision import InFullPrecision

FINEST, PUBLISHED_CHANNELS = 8, 256  # the stride of the finest map that is read, and the width of the head


@dataclass(frozen=True)
class RetinaNetOptions(DetectorOptions):
    """Beside `DetectorOptions`. anchor_scale: anchors of a level are anchor_scale x stride, times 1, 2^(1/3) and
    2^(2/3); 4 as published, 2 or less for objects that are small in the input (images of 320 px). anchor_sizes: or
    name the sizes (pixels) of every level, which are the levels read and two more. anchor_ratios: height / width.
    box_loss: l1, smooth_l1 or giou. candidates: so many of each level go into the suppression of doubles.
    extra_levels: P6 is computed from the backbone's map ("input", as published) or from P5 ("output").
    group_norm: norms of 32 groups (of 32 channels 16) in the head's convolutions, as in torchvision's second version,
    for narrow heads and short trainings; channels must then be a multiple of 32.
    """

    box_losses: ClassVar[tuple[str, ...]] = ("l1", "smooth_l1", "giou")

    anchor_scale: float = 4.0
    anchor_sizes: tuple[tuple[float, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    box_loss: str = "l1"
    candidates: int = 1000
    extra_levels: str = "input"
    group_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box_loss not in self.box_losses:
            raise ValueError(f"box_loss must be one of {', '.join(self.box_losses)}, got {self.box_loss!r}")
        if self.group_norm and self.channels % 32:
            raise ValueError(f"group_norm has 32 groups: channels must be a multiple of 32, got {self.channels}")
        if not self.anchor_scale > 0 or not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise ValueError("anchor_scale and anchor_ratios must be positive")


class RetinaNetDetector(Detector, RetinaNet):
    """torchvision's RetinaNet (Lin et al., 2017, arXiv 1708.02002) on any pyramid.

        training: model(list of (3, H, W), list of {"boxes", "labels"}) -> {"classification", "bbox_regression"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 4) xyxy pixels, "labels" (n,) from 0, "scores" (n,)}

    By default the maps with strides 8 to 32, an FPN with P6 and P7, 9 anchors a cell. The losses are torchvision's: the
    focal loss (alpha 0.25, gamma 2) and the box loss are divided by the number of foreground anchors of each image,
    then averaged over images; mmdetection divides by that of the batch. Images without objects count in the focal loss.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: RetinaNetOptions):
        neck = neck_of(pyramid, options, FINEST, options.extra_levels)
        anchors = PyramidAnchors(*anchor_shapes(options, neck.strides), neck.strides)
        head = _Head(options.channels, anchors.num_anchors_per_location()[0], num_classes, norm_of(options))
        head.regression_head._loss_type = options.box_loss
        super().__init__(
            neck,
            num_classes,
            anchor_generator=anchors,
            head=head,
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold,
            detections_per_img=options.detections_per_image,
            topk_candidates=options.candidates,
        )
        self._says(pyramid, num_classes, options)


class _Head(InFullPrecision, RetinaNetHead):
    """Logits and box changes in float32.

    Without norms, weights start with the standard deviation 0.01 sqrt(256 / channels), as published for 256 channels.
    With 0.01 for all widths, as in torchvision, a head of 16 channels would begin with logits 4,000 times smaller, and
    gradients likewise, so that it does not learn to classify.
    """

    def __init__(self, channels: int, anchors: int, num_classes: int, norm: Callable[..., nn.Module] | None):
        super().__init__(channels, anchors, num_classes, norm)
        if norm is None:
            start_as_published(self, channels)


def start_as_published(head: nn.Module, channels: int) -> None:
    """Weights of a head without norms, with the standard deviation 0.01 sqrt(256 / channels)."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01 * math.sqrt(PUBLISHED_CHANNELS / channels))


def anchor_shapes(
    options: RetinaNetOptions, strides: Sequence[int]
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """(sizes, ratios) of the anchors of each level: three sizes an octave, unless the options name them."""
    octaves = [options.anchor_scale * 2 ** (octave / 3) for octave in range(3)]
    return anchor_sizes(options.anchor_sizes, strides, octaves), [options.anchor_ratios] * len(strides)


def norm_of(options: RetinaNetOptions) -> Callable[..., nn.Module] | None:
    """The head's norms by `group_norm`."""
    return functools.partial(nn.GroupNorm, norm_groups(options.channels)) if options.group_norm else None


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> RetinaNetDetector:
    """A RetinaNet on a pyramid; options: fields of `RetinaNetOptions`."""
    return RetinaNetDetector(pyramid, num_classes, options_from(RetinaNetOptions, "retinanet", options))


def build(body: Body, num_classes: int, **options: Any) -> RetinaNetDetector:
    """A RetinaNet on a backbone; options: fields of `RetinaNetOptions`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, RetinaNetOptions, "retinanet", options, FINEST)
    return RetinaNetDetector(pyramid, num_classes, own)
