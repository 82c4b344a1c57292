"""Transforms of oriented boxes, from a picture and its corners to what a network reads.

They take (PIL image, truth) as `OrientedImages` gives them. Every step moves the four corners of each object as it
moves the picture, so that nothing is lost on the way; at the end the smallest rectangle about the corners is the box
(n, 5): (cx, cy, w, h, angle), in radians, le90. Of torchvision's transforms only those of the picture are used: its
rotated boxes become rectangles at every step, and its key points count pixels from their centres when flipped.
All random numbers are torch's, so that a loader's seed of an item decides them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from deltalens.data.dense_resizing import ResizeSides, SizeCrop
from deltalens.data.dense_transforms import DenseAugmentation, detection_resize, normalise
from deltalens.data.quadrilaterals import areas_of, shares_inside
from deltalens.models.oriented_boxes import boxes_of, corners_of


def oriented_train_transform(
    preprocessing: dict[str, Any],
    augmentation: DenseAugmentation = DenseAugmentation(),  # noqa: B008  (frozen)
) -> v2.Compose:
    """Resize, perhaps crop, one flip or none, perhaps a turn; boxes (n, 5). As mmrotate, but for the crop.

    The target's area is that of the quadrilaterals behind the resizing."""
    resize = ResizeCorners(detection_resize(augmentation.short_sides, augmentation.long_side))
    steps: Any = resize
    if augmentation.random_crop:
        cut = [
            ResizeCorners(ResizeSides(augmentation.crop_short_sides)),
            CropCorners(SizeCrop(augmentation.crop_range), augmentation.kept_share),
        ]
        steps = v2.RandomChoice([resize, v2.Compose([*cut, resize])])
    mean = list(preprocessing["mean"])
    mean = mean[::-1] if preprocessing.get("channel_order") == "bgr" else mean
    turn = TurnCorners(augmentation.rotation, augmentation.rotation_angles, mean)
    return v2.Compose(
        [
            v2.ToImage(),
            steps,
            FlipCorners(augmentation.flips),
            turn,
            Boxes(augmentation.min_box, augmentation.difficult),
            *normalise(preprocessing),
            v2.ToPureTensor(),
        ]
    )


def oriented_eval_transform(preprocessing: dict[str, Any]) -> v2.Compose:
    """The picture and the target in one frame, resized to at most the sides `preprocessing["test_size"]`, (short,
    long), by default only shrunk to 800 x 1333. All objects are kept.

    The target also gets scale (float32 (2,): factors of x and y) and orig_size (int64 (2,): height, width), and where
    the picture was resized the boxes as they were: orig_boxes (n, 5). See `oriented_in_original_pixels`. Its area stays
    that of the annotation.
    """
    sides = preprocessing.get("test_size")
    resize = detection_resize((sides[0],) if sides else None, sides[1] if sides else None)
    return v2.Compose(
        [
            v2.ToImage(),
            WithOriginalCorners(ResizeCorners(resize)),
            Boxes(),
            *normalise(preprocessing),
            v2.ToPureTensor(),
        ]
    )


def oriented_in_original_pixels(found: dict[str, Tensor], target: dict[str, Any]) -> dict[str, Tensor]:
    """What a detector found in a picture of `oriented_eval_transform`, in pixels of the picture as it was read. Nothing
    is clipped: an oriented box may reach out of its picture."""
    return found | {"boxes": scaled(found["boxes"], 1 / target["scale"].to(found["boxes"].device))}


def oriented_truth_in_original_pixels(target: dict[str, Any]) -> dict[str, Any]:
    """The target of `oriented_eval_transform` with the boxes of the picture as it was read."""
    return target | {"boxes": target.get("orig_boxes", target["boxes"])}


def scaled(boxes: Tensor, factors: Tensor) -> Tensor:
    """Boxes (n, 5) in a picture of another size. factors: (2,) of x and y.

    With one factor for both, only centres and sides change. With two, a rectangle that is not upright becomes a
    parallelogram, and its smallest rectangle is the box.
    """
    factors = factors.to(boxes)
    if abs(float(factors[0] / factors[1]) - 1) < 1e-6:
        return torch.cat([boxes[..., :4] * factors.repeat(2), boxes[..., 4:]], -1)
    return boxes_of(corners_of(boxes) * factors)


# ------------------------------------------------------------------ steps
class ResizeCorners(torch.nn.Module):
    """A transform v2 that resizes, for the picture and for its corners."""

    def __init__(self, resize: torch.nn.Module):
        super().__init__()
        self.resize = resize

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        resized = self.resize(image)
        factors = torch.tensor([resized.shape[-1] / image.shape[-1], resized.shape[-2] / image.shape[-2]])
        return resized, target | {"corners": target["corners"] * factors}


class CropCorners(torch.nn.Module):
    """A random crop that says its window in `make_params`. Objects keep their corners where at least `kept_share` of
    their area is in the crop; the others are removed."""

    def __init__(self, crop: v2.Transform, kept_share: float):
        super().__init__()
        self.crop, self.kept_share = crop, kept_share

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        cut = self.crop.make_params([image])
        left, top = cut["left"], cut["top"]
        window = (left, top, left + cut["width"], top + cut["height"])
        kept = torch.from_numpy(shares_inside(target["corners"].numpy(), window) >= max(self.kept_share, 1e-9))
        target = target | {"corners": target["corners"] - torch.tensor([left, top])}
        return functional.crop(image, **cut), chosen(target, kept)


class FlipCorners(torch.nn.Module):
    """One of three flips, or none: horizontal, vertical and diagonal (both at once), each with its probability."""

    def __init__(self, shares: tuple[float, float, float]):
        super().__init__()
        self.shares = shares

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        drawn = float(torch.rand(()))
        which = next((i for i in range(3) if drawn < sum(self.shares[: i + 1])), None)
        corners, (height, width) = target["corners"].clone(), image.shape[-2:]
        if which in (0, 2):
            image = functional.horizontal_flip(image)
            corners[..., 0] = width - corners[..., 0]
        if which in (1, 2):
            image = functional.vertical_flip(image)
            corners[..., 1] = height - corners[..., 1]
        return image, target | {"corners": corners}


class TurnCorners(torch.nn.Module):
    """A turn about the middle of the picture, which keeps its size; what comes from outside has the mean colour.

    probability: of a turn. angles: in degrees, one of which is drawn; None for any between -180 and 180. A positive
    angle turns clockwise. Objects whose centre leaves the picture are removed.
    """

    def __init__(self, probability: float, angles: tuple[float, ...] | None, mean: Sequence[float]):
        super().__init__()
        self.probability, self.angles = probability, angles
        self.fill = [255 * float(value) for value in mean]

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if float(torch.rand(())) >= self.probability:
            return image, target
        if self.angles is None:
            angle = 360 * float(torch.rand(())) - 180
        else:
            angle = self.angles[int(torch.randint(len(self.angles), ()))]
        height, width = image.shape[-2:]
        turned = functional.rotate(image, -angle, interpolation="bilinear", fill=self.fill)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        middle = torch.tensor([width / 2, height / 2])
        corners = (target["corners"] - middle) @ torch.tensor([[cos, sin], [-sin, cos]]) + middle
        centres = corners.mean(1)
        kept = ((centres >= 0) & (centres <= 2 * middle)).all(1)
        return turned, chosen(target | {"corners": corners}, kept)


class WithOriginalCorners(torch.nn.Module):
    """Resizes picture and corners, and keeps in the target what they were."""

    def __init__(self, resize: ResizeCorners):
        super().__init__()
        self.resize = resize

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        before, corners = tuple(image.shape[-2:]), target["corners"]
        resized, target = self.resize(image, target)
        after = tuple(resized.shape[-2:])
        target = target | {
            "orig_size": torch.tensor(before),
            "scale": torch.tensor([after[1] / before[1], after[0] / before[0]]),
        }
        return resized, target | ({"orig_boxes": boxes_of(corners)} if after != before else {})


class Boxes(torch.nn.Module):
    """Corners become boxes (n, 5). With `min_box`, for training: without boxes that have a shorter side, and perhaps
    without difficult objects; the area is then that of the quadrilaterals as they are here."""

    def __init__(self, min_box: float | None = None, difficult: bool = True):
        super().__init__()
        self.min_box, self.difficult = min_box, difficult

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        target = dict(target)
        corners = target.pop("corners")
        target["boxes"] = boxes_of(corners)
        if self.min_box is None:
            return image, target
        target["area"] = torch.from_numpy(areas_of(corners.numpy())).float()
        sides = target["boxes"][:, 2:4]
        kept = (sides > 0).all(1) & (sides >= self.min_box).all(1)
        if not self.difficult:
            kept &= target["difficult"] == 0
        return image, chosen(target, kept)


def chosen(target: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """The target with some of its objects. kept: (n,) bool."""
    return {name: value[kept] if isinstance(value, Tensor) and value.dim() else value for name, value in target.items()}
