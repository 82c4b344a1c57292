"""H2RBox-v2: oriented boxes, learnt from upright ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.fcos import FCOSHead, FCOSRegressionHead
from torchvision.ops import sigmoid_focal_loss

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.detector_options import norm_groups, options_from, pyramid_and_options
from deltalens.backbones.dense.detector_parts import Detector, neck_of
from deltalens.backbones.dense.fcos import FINEST, FCOSOptions
from deltalens.backbones.dense.h2rbox_losses import (
    boxes_around,
    centreness,
    circumscribed_loss,
    owners,
    symmetry_loss,
)
from deltalens.backbones.dense.h2rbox_views import draw_view
from deltalens.backbones.dense.oriented_anchors import upright_as_oriented
from deltalens.backbones.dense.oriented_batch import OrientedBatch
from deltalens.backbones.dense.oriented_detections import candidates, checked_targets, without_doubles
from deltalens.backbones.dense.phase_coder import STEPS, decode_angles
from deltalens.backbones.dense.precision import InFullPrecision
from deltalens.models.oriented_boxes import enclosing

SHRUNK = 0.85  # sides of `shrunk_classes`


@dataclass(frozen=True)
class H2RBoxV2Options(FCOSOptions):
    """Beside `FCOSOptions`, of which some defaults are mmrotate's: nms_threshold 0.1, up to 2000 detections an image,
    2000 candidates a level.

    turned: how often the second view is turned (else it is flipped upside down), by an angle between both `turns`, in
    half turns. symmetry_weight: of the loss between both views' angles. square_classes: numbers of classes that have no
    direction, whose angle is 0 and costs nothing (in DOTA 1, 9, 11: baseball diamonds, storage tanks, roundabouts).
    shrunk_classes: whose found boxes are 0.85 times as large (in DOTA 1, whose annotated boxes are squares turned by
    45 degrees).
    """

    nms_threshold: float = 0.1
    detections_per_image: int = 2000
    candidates: int = 2000
    turned: float = 0.95
    turns: tuple[float, ...] = (0.25, 0.75)
    symmetry_weight: float = 0.2
    square_classes: tuple[int, ...] = ()
    shrunk_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.turned <= 1:
            raise ValueError(f"turned is a probability between 0 and 1, got {self.turned}")
        if len(self.turns) != 2 or self.turns[0] > self.turns[1]:
            raise ValueError(f"turns are two angles in half turns, the smaller first, got {self.turns}")
        if not self.symmetry_weight >= 0:
            raise ValueError(f"symmetry_weight must not be negative, got {self.symmetry_weight}")


class H2RBoxV2(Detector, nn.Module):
    """H2RBox-v2 (Yu et al., NeurIPS 2023, arXiv 2304.04403) on any pyramid, in the form of Mona's experiments.

        training: model(list of (3, H, W), list of {"boxes" (n, 5), "labels"})
                  -> {"classification", "bbox_regression", "bbox_ctrness", "symmetry"}
        eval:     model(list of (3, H, W)) -> list of {"boxes" (n, 5) in le90, "labels" (n,) from 0, "scores" (n,)}

    Of the targets it sees the upright boxes around them, and never their angles. In training each batch is seen twice,
    as it is and turned or flipped (`SecondView`):

        angle     three codes a cell (`phase_coder`); an object's angles in both views must differ as the views do
                  (`symmetry_loss`), which alone teaches it what an angle is
        box       distances to the sides in the axes of the found angle; the box around it must be the given one
                  (`circumscribed_loss`, weighed with the centre-ness; no gradient for the angle)
        classes and centre-ness as in FCOS, over both views together

    In evaluation there is one view. A score is the square root of class probability times centre-ness, as in our FCOS;
    the authors' is the product, which has the same order.

    Read in the authors' code for Mona's experiments (`H2RBoxV2P`): one second view (95 % turned by 45 to 135 degrees),
    coder of one frequency, weight 0.2, beta 0.1. The paper's first code sees three views. What differs here: turned
    images are interpolated linearly; distances have no learnt scale for each level; a given box is compared in its own
    axes. Distances are relu(.) x stride, and labels, IoUs and losses are float32.

    Raises ValueError for square or shrunk classes that are none.
    """

    def __init__(self, pyramid: nn.Module, num_classes: int, options: H2RBoxV2Options):
        super().__init__()
        for number in (*options.square_classes, *options.shrunk_classes):
            if not 0 <= number < num_classes:
                raise ValueError(f"square and shrunk classes lie between 0 and {num_classes - 1}, got {number}")
        self.backbone = neck_of(pyramid, options, FINEST, options.extra_levels)
        self.head = _Head(options.channels, num_classes, options.convolutions)
        self.options = options
        self.score_thresh = options.score_threshold
        self._says(pyramid, num_classes, options)
        self.transform = OrientedBatch(options)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if self.training:
            batch, inside = self.transform(images, checked_targets(targets))
            return self._losses(batch.tensors, inside)
        batch, _ = self.transform(images)
        maps = list(self.backbone(batch.tensors).values())
        output = self.head(maps)
        points, strides = self._cells(maps)
        counts = [level.shape[-2] * level.shape[-1] for level in maps]
        found = []
        for each, size in enumerate(batch.image_sizes):
            levels = zip(
                *(output[name][each].split(counts) for name in ("cls_logits", "bbox_ctrness", "distances", "codes")),
                points.split(counts),
                strides.split(counts),
                strict=True,
            )
            found.append(self._detections(list(levels), size))
        return self.transform.postprocess(found, batch.image_sizes, [tuple(image.shape[-2:]) for image in images])

    def _cells(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Centres (n, 2) and strides (n,) of all levels' cells, in pixels."""
        points, strides = [], []
        for level, stride in zip(maps, self.backbone.strides, strict=True):
            height, width = level.shape[-2:]
            rows = torch.arange(height, dtype=level.dtype, device=level.device)
            columns = torch.arange(width, dtype=level.dtype, device=level.device)
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            points.append((torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride)
            strides.append(torch.full_like(points[-1][:, 0], stride))
        return torch.cat(points), torch.cat(strides)

    def _is(self, labels: Tensor, classes: tuple[int, ...]) -> Tensor:
        return torch.isin(labels, torch.tensor(classes, dtype=labels.dtype, device=labels.device))

    def _losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        view = draw_view(self.options.turned, self.options.turns)
        maps = list(self.backbone(torch.cat([images, view.of_images(images)])).values())
        output = self.head(maps)
        points, strides = self._cells(maps)
        given = [upright_as_oriented(enclosing(target["boxes"].to(points.dtype))) for target in targets]
        size = images.shape[-2], images.shape[-1]
        turned = [view.of_boxes(boxes, size) for boxes in given]
        owned = [owners(boxes, points, strides, self.options.center_radius) for boxes in given + turned]
        owner, sides = torch.stack([each[0] for each in owned]), torch.stack([each[1] for each in owned])
        image, cell = (owner >= 0).nonzero().unbind(1)
        counts = [len(boxes) for boxes in given]
        starts = torch.tensor([sum(counts[:each]) for each in range(len(counts))], device=owner.device)
        objects, second = starts[image % len(counts)] + owner[image, cell], image >= len(counts)
        labels = torch.cat([target["labels"] for target in targets])
        square = self._is(labels, self.options.square_classes)
        total = max(1, len(image))

        wanted = torch.zeros_like(output["cls_logits"])
        wanted[image, cell, labels[objects]] = 1.0
        classification = sigmoid_focal_loss(output["cls_logits"], wanted, reduction="sum") / total
        codes, sides = output["codes"][image, cell], sides[image, cell]
        wanted_centreness = centreness(sides)
        found_centreness = output["bbox_ctrness"][image, cell, 0]
        centre_loss = functional.binary_cross_entropy_with_logits(found_centreness, wanted_centreness, reduction="sum")
        angles = torch.where(square[objects], 0, decode_angles(codes.detach()))
        distances = output["distances"][image, cell] * strides[cell, None]
        found = boxes_around(points[cell], distances, angles)
        true = torch.where(second[:, None], torch.cat(turned)[objects], torch.cat(given)[objects])
        true = torch.cat([true[:, :4], torch.where(square[objects], 0, true[:, 4])[:, None]], 1)
        box_losses = circumscribed_loss(found, true) * wanted_centreness
        return {
            "classification": classification,
            "bbox_regression": box_losses.sum() / wanted_centreness.sum().clamp(min=1e-6),
            "bbox_ctrness": centre_loss / total,
            "symmetry": self.options.symmetry_weight * symmetry_loss(codes, objects, second, square, view),
        }

    def _detections(self, levels: list[tuple[Tensor, ...]], size: tuple[int, int]) -> dict[str, Tensor]:
        boxes, scores, labels = [], [], []
        for logits, centre, distances, codes, points, strides in levels:
            probabilities = (logits.sigmoid() * centre.sigmoid()).sqrt()
            best, rows, classes = candidates(probabilities, self.score_thresh, self.options.candidates)
            angles = torch.where(self._is(classes, self.options.square_classes), 0, decode_angles(codes[rows]))
            found = boxes_around(points[rows], distances[rows] * strides[rows, None], angles)
            scale = torch.where(self._is(classes, self.options.shrunk_classes), SHRUNK, 1.0)[:, None]
            boxes.append(torch.cat([found[:, :2], found[:, 2:4] * scale, found[:, 4:]], 1))
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


class _Regression(FCOSRegressionHead):
    """Beside FCOS' distances, here in strides, and centre-ness: codes of angles, of the same convolutions."""

    def __init__(self, channels: int, convolutions: int):
        super().__init__(channels, 1, convolutions)
        self.angle_codes = nn.Conv2d(channels, STEPS, kernel_size=3, padding=1)
        nn.init.normal_(self.angle_codes.weight, std=0.01)
        nn.init.constant_(self.angle_codes.bias, 0.0)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        read = [self.conv(level) for level in maps]
        layers = {"distances": self.bbox_reg, "bbox_ctrness": self.bbox_ctrness, "codes": self.angle_codes}
        found = {
            name: torch.cat([layer(level).flatten(2).transpose(1, 2) for level in read], 1)
            for name, layer in layers.items()
        }
        return {**found, "distances": found["distances"].relu()}


class _FCOSHead(FCOSHead):
    """FCOS' head with angles."""

    def __init__(self, channels: int, num_classes: int, convolutions: int):
        super().__init__(channels, 1, num_classes, convolutions)
        self.regression_head = _Regression(channels, convolutions)
        for norm in (each for each in self.modules() if isinstance(each, nn.GroupNorm)):
            norm.num_groups = norm_groups(channels)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"cls_logits": self.classification_head(maps), **self.regression_head(maps)}


class _Head(InFullPrecision, _FCOSHead):
    """Everything in float32."""


def on_pyramid(pyramid: nn.Module, num_classes: int, options: Mapping[str, Any] | None = None) -> H2RBoxV2:
    """An H2RBox-v2 on a pyramid; options: fields of `H2RBoxV2Options`."""
    return H2RBoxV2(pyramid, num_classes, options_from(H2RBoxV2Options, "h2rbox_v2", options))


def build(body: Body, num_classes: int, **options: Any) -> H2RBoxV2:
    """An H2RBox-v2 on a backbone; options: fields of `H2RBoxV2Options`, and those of `pyramid_and_options`."""
    pyramid, own = pyramid_and_options(body, H2RBoxV2Options, "h2rbox_v2", options, FINEST)
    return H2RBoxV2(pyramid, num_classes, own)
