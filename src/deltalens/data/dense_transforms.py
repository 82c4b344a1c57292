"""Transforms of dense tasks, from a picture and its truth to what a network reads.

They take (PIL image, truth) as `DenseImages` gives them and use torchvision's transforms v2, so that masks and boxes go
where the picture goes. Pictures become float32 (3, H, W), normalised as `preprocessing` says; they are resized with
bilinear interpolation, masks to the nearest value. All random numbers are torch's, so that a loader's seed of an item
decides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nn_functional
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from deltalens.data.dense_resizing import ClassCrop, PadTo, RandomScale, ResizeSides, SizeCrop
from deltalens.data.transforms import SwapColours

OWN_SIZE = (800, 1333)  # pictures of detection are shrunk to these sides where nothing else is said


@dataclass(frozen=True)
class DenseAugmentation:
    """Of training pictures.

    Segmentation. crop_size: edge of the square crops, None for the model's input size. scale: range of the factor that
    pictures are resized by before; short_side, long_side: what the factor multiplies, the largest size with at most
    these sides, None for the picture's own. max_class_share: a crop with more of one class is drawn again, up to ten
    times; 1 for the first one. photometric: brightness, contrast, saturation and hue are changed, each of half the
    pictures.

    Detection and instances. short_sides: one of these is drawn for every picture, whose long side is at most long_side;
    None for its own size, shrunk to 800 x 1333. random_crop: half of the pictures are resized to a short side of
    crop_short_sides and cut to a part with sides in crop_range before (DETR). min_box: smaller boxes are removed, in
    pixels behind the resizing. difficult: whether objects so marked are trained on; crowds never are.

    Oriented boxes: short_sides, long_side, random_crop, min_box (of the shorter side) and difficult are as for
    detection. kept_share: objects with less of their area in a crop are removed. flips: probabilities of a horizontal,
    a vertical and a diagonal flip, of which at most one is made. rotation: probability of a turn about the middle;
    rotation_angles: in degrees, of which one is drawn, None for any.

    Raises ValueError for what is out of range.
    """

    crop_size: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    short_side: int | None = None
    long_side: int | None = None
    max_class_share: float = 0.75
    photometric: bool = True
    short_sides: tuple[int, ...] | None = None
    random_crop: bool = False
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    min_box: float = 1.0
    difficult: bool = False
    flips: tuple[float, float, float] = (0.25, 0.25, 0.25)
    rotation: float = 0.0
    rotation_angles: tuple[float, ...] | None = None
    kept_share: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is a range of factors above 0, smallest first, got {self.scale}")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"max_class_share must be in (0, 1], got {self.max_class_share}")
        sides = [self.crop_size, self.short_side, self.long_side, *self.crop_short_sides, *self.crop_range]
        if any(side is not None and side < 1 for side in (*sides, *(self.short_sides or ()))):
            raise ValueError("sides of pictures and crops are numbers of pixels from 1")
        if self.short_sides is not None and not self.short_sides:
            raise ValueError("short_sides needs one side or more, or None for the pictures' own size")
        if self.crop_range[0] > self.crop_range[1]:
            raise ValueError(f"crop_range is the smallest and the largest side, got {self.crop_range}")
        if self.min_box < 0:
            raise ValueError(f"min_box is a number of pixels, got {self.min_box}")
        if len(self.flips) != 3 or min(self.flips) < 0 or sum(self.flips) > 1 + 1e-6:
            raise ValueError(f"flips are three probabilities whose sum is at most 1, got {self.flips}")
        if not 0 <= self.rotation <= 1 or not 0 <= self.kept_share <= 1:
            raise ValueError(f"rotation and kept_share lie in [0, 1], got {self.rotation} and {self.kept_share}")
        if self.rotation_angles is not None and not self.rotation_angles:
            raise ValueError("rotation_angles needs one angle or more, or None for any")


def segmentation_train_transform(
    preprocessing: dict[str, Any], augmentation: DenseAugmentation = DenseAugmentation(), hflip: float = 0.5
) -> v2.Compose:
    """Random scale, crop, flip, colours: (3, S, S) and int64 (S, S) with the crop's edge S, 255 where nothing is known.

    As mmsegmentation trains on ADE20K, but for two of the colours' changes: brightness is changed by a factor of 7/8 to
    9/8 instead of adding up to 32, and contrast about the mean grey instead of about black. Smaller pictures are filled
    with the mean colour at the right and below.
    """
    _, height, width = preprocessing["input_size"]
    size = (height, width) if augmentation.crop_size is None else (augmentation.crop_size,) * 2
    return v2.Compose(
        [
            v2.ToImage(),
            RandomScale(augmentation.scale, augmentation.short_side, augmentation.long_side),
            ClassCrop(size, augmentation.max_class_share),
            v2.RandomHorizontalFlip(hflip),
            *(_photometric() if augmentation.photometric else []),
            *normalise(preprocessing),
            PadTo(size),
            v2.ToPureTensor(),
        ]
    )


def segmentation_eval_transform(preprocessing: dict[str, Any]) -> v2.Compose:
    """(3, h, w) and the mask as it is, int64 (H, W).

    The picture keeps its size, or is resized to the largest one with at most the sides `preprocessing["test_size"]`,
    (short, long). Logits then are to be resized to the mask.
    """
    sides = preprocessing.get("test_size")
    resize = [OnPicture(ResizeSides((sides[0],), sides[1]))] if sides else []
    return v2.Compose([v2.ToImage(), *resize, *normalise(preprocessing), v2.ToPureTensor()])


def detection_train_transform(
    preprocessing: dict[str, Any], augmentation: DenseAugmentation = DenseAugmentation(), hflip: float = 0.5
) -> v2.Compose:
    """Flip, resize, perhaps crop; for boxes and for masks of objects. The target's area is that of the masks, else of
    the boxes, behind the resizing."""
    resize = detection_resize(augmentation.short_sides, augmentation.long_side)
    steps: Any = resize
    if augmentation.random_crop:
        cut = [ResizeSides(augmentation.crop_short_sides), SizeCrop(augmentation.crop_range), resize]
        steps = v2.RandomChoice([resize, v2.Compose(cut)])
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(hflip),
            steps,
            v2.ClampBoundingBoxes(),
            WithoutUnusable(augmentation.min_box, augmentation.difficult),
            *normalise(preprocessing),
            v2.ToPureTensor(),
        ]
    )


def detection_eval_transform(preprocessing: dict[str, Any]) -> v2.Compose:
    """The picture and the target in one frame, resized to at most the sides `preprocessing["test_size"]`, (short,
    long), by default only shrunk to 800 x 1333. All objects are kept.

    The target also gets scale (float32 (2,): factors of x and y) and orig_size (int64 (2,): height, width), and where
    the picture was resized the boxes and masks as they were: orig_boxes, orig_masks. See `in_original_pixels`. Its area
    stays that of the annotation.
    """
    sides = preprocessing.get("test_size")
    resize = detection_resize((sides[0],) if sides else None, sides[1] if sides else None)
    return v2.Compose([v2.ToImage(), WithOriginal(resize), *normalise(preprocessing), v2.ToPureTensor()])


def in_original_pixels(found: dict[str, Tensor], target: dict[str, Any]) -> dict[str, Tensor]:
    """What a detector found in a picture of `detection_eval_transform`, in pixels of the picture as it was read: boxes
    (n, 4), and masks (n, 1, h, w) of probabilities as (n, 1, H, W)."""
    height, width = (int(side) for side in target["orig_size"])
    scale = target["scale"].to(found["boxes"])
    boxes = found["boxes"] / scale.repeat(2)
    limits = torch.tensor([width, height, width, height]).to(boxes)
    moved = found | {"boxes": boxes.clamp(min=0).minimum(limits)}
    if "masks" in found and tuple(found["masks"].shape[-2:]) != (height, width):
        masks = found["masks"].float()
        if len(masks):
            masks = nn_functional.interpolate(masks, (height, width), mode="bilinear", align_corners=False)
        moved["masks"] = masks if len(masks) else masks.new_zeros(0, 1, height, width)
    return moved


def truth_in_original_pixels(target: dict[str, Any]) -> dict[str, Any]:
    """The target of `detection_eval_transform` with the boxes and masks of the picture as it was read."""
    names = {"boxes": "orig_boxes", "masks": "orig_masks"}
    return {name: target.get(names.get(name, ""), value) for name, value in target.items()}


# ------------------------------------------------------------------ steps
class OnPicture(torch.nn.Module):
    """A transform of the picture alone."""

    def __init__(self, step: torch.nn.Module):
        super().__init__()
        self.step = step

    def forward(self, image: Any, truth: Any) -> tuple[Any, Any]:
        return self.step(image), truth


class WithoutUnusable(torch.nn.Module):
    """Removes what is not trained on: crowds, perhaps difficult objects, small boxes, and masks that a crop emptied."""

    def __init__(self, min_box: float, difficult: bool):
        super().__init__()
        self.min_box, self.difficult = min_box, difficult

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        kept = (sides > 0).all(1) & (sides >= self.min_box).all(1) & (target["iscrowd"] == 0)
        if not self.difficult:
            kept &= target["difficult"] == 0
        if "masks" in target:
            kept &= (target["masks"] != 0).flatten(1).any(1)
        left = {name: value[kept] for name, value in target.items() if isinstance(value, Tensor)}
        for name in ("boxes", "masks"):
            if name in left:
                left[name] = tv_tensors.wrap(left[name], like=target[name])
        left["area"] = left["masks"].flatten(1).sum(1).float() if "masks" in left else sides[kept].prod(1)
        return image, target | {name: value for name, value in left.items() if value.dim()}


class WithOriginal(torch.nn.Module):
    """Resizes picture and target, and keeps in the target what they were."""

    def __init__(self, resize: torch.nn.Module):
        super().__init__()
        self.resize = resize

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        before = tuple(image.shape[-2:])
        resized, moved = self.resize(image, target)
        after = tuple(resized.shape[-2:])
        moved["orig_size"] = torch.tensor(before)
        moved["scale"] = torch.tensor([after[1] / before[1], after[0] / before[0]])
        if after != before:
            moved |= {f"orig_{name}": target[name].as_subclass(Tensor) for name in ("boxes", "masks") if name in target}
        return resized, moved


def detection_resize(shorts: tuple[int, ...] | None, long: int | None) -> ResizeSides:
    """To one of these short sides and at most this long side; without `shorts` only shrunk to `OWN_SIZE`."""
    if shorts is None:
        return ResizeSides((OWN_SIZE[0],), long or OWN_SIZE[1], enlarge=False)
    return ResizeSides(shorts, long)


def _photometric() -> list[torch.nn.Module]:
    """The hue turns by up to a tenth of the circle, which is 18 of OpenCV's 180 steps."""
    changes: list[dict[str, Any]] = [{"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
    return [v2.RandomApply([v2.ColorJitter(**change)], p=0.5) for change in changes]


def normalise(preprocessing: dict[str, Any]) -> list[torch.nn.Module]:
    """Steps from uint8 to the float32 that a network reads."""
    swap = [OnPicture(SwapColours())] if preprocessing.get("channel_order") == "bgr" else []
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    return [*swap, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
