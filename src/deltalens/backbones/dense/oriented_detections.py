"""What one-stage oriented detectors do before and after their layers: targets checked, detections chosen."""

from __future__ import annotations

from torch import Tensor

from deltalens.backbones.dense.oriented_proposals import overlaps_image
from deltalens.models.oriented_boxes import as_convention
from deltalens.models.oriented_nms import batched_oriented_nms

LEAST_SIDE = 1e-2  # pixels; torchvision's


def candidates(scores: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best scores above the threshold of (n, classes), at most so many: scores, rows, classes."""
    values = scores.flatten()
    above = (values > threshold).nonzero()[:, 0]
    kept, order = values[above].topk(min(most, len(above)))
    places = above[order]
    return kept, places // scores.shape[1], places % scores.shape[1]


def without_doubles(
    boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int], threshold: float, most: int
) -> dict[str, Tensor]:
    """Detections {"boxes" (n, 5) in le90, "labels", "scores"}, best first: of two of one class with a larger IoU than
    the threshold the better one. Those outside of the image of the size (H, W), in what a batch is padded with, are
    dropped."""
    inside = overlaps_image(boxes, size, LEAST_SIDE)
    boxes, scores, labels = boxes[inside], scores[inside], labels[inside]
    kept = batched_oriented_nms(boxes, scores, labels, threshold)[:most]
    return {"boxes": as_convention(boxes[kept], "le90"), "labels": labels[kept], "scores": scores[kept]}


def checked_targets(targets: list[dict[str, Tensor]] | None) -> list[dict[str, Tensor]]:
    """The targets; ValueError where there are none, or boxes are not (n, 5) or not finite."""
    if targets is None:
        raise ValueError("in training the network needs targets beside the images, a list of {'boxes', 'labels'}")
    for number, target in enumerate(targets):
        boxes = target["boxes"]
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"targets of oriented boxes are (n, 5), (cx, cy, w, h, angle); those of image {number} are "
                f"{tuple(boxes.shape)}"
            )
        if not boxes.isfinite().all():
            raise ValueError(f"a box of image {number} is not finite; leave such boxes out")
    return targets
