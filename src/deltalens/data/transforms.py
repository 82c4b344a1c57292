"""Image transforms that follow a model's preprocessing, with torchvision's transforms v2.

`preprocessing` is the dictionary of `deltalens.preprocessing(model)`: input_size (C, H, W), mean, std, interpolation,
crop_pct, crop_mode. Transforms take a PIL image, a uint8 array (H, W, C) or a uint8 tensor (C, H, W) and give a float32
tensor (C, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2


def train_transform(
    preprocessing: dict[str, Any], min_crop: float = 0.5, hflip: float = 0.5, rand_augment: int = 0
) -> v2.Compose:
    """Random resized crop, horizontal flip, normalisation.

    min_crop: smallest share of the image's area that a crop keeps; 1 keeps the proportions and the centre, as much of
    it as fits, or with crop_mode "squash" the whole image without its proportions; nothing is random then.
    hflip: probability of a horizontal flip; 0 for digits, letters, and whatever has a side. rand_augment: magnitude of
    RandAugment's two operations (Cubuk et al. 2020), 0 for none, 9 is usual.
    """
    if not 0 < min_crop <= 1:
        raise ValueError(f"min_crop must be in (0, 1], got {min_crop}")
    if not 0 <= hflip <= 1:
        raise ValueError(f"hflip is a probability, got {hflip}")
    if not 0 <= rand_augment <= 30:
        raise ValueError(f"rand_augment is a magnitude from 0 (none) to 30, got {rand_augment}")
    _, height, width = preprocessing["input_size"]
    mode = InterpolationMode(preprocessing["interpolation"])
    steps: list[Any] = [v2.RandomResizedCrop((height, width), (min_crop, 1.0), (3 / 4, 4 / 3), mode, antialias=True)]
    if min_crop == 1 and preprocessing.get("crop_mode") == "squash":
        steps = [v2.Resize((height, width), mode, antialias=True)]
    elif min_crop == 1:
        steps = [ResizeToCover((height, width), mode), v2.CenterCrop((height, width))]
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if rand_augment:
        steps.append(v2.RandAugment(2, rand_augment, fill=[round(255 * m) for m in preprocessing["mean"]]))
    return v2.Compose([v2.ToImage(), *steps, *_normalise(preprocessing)])


def eval_transform(preprocessing: dict[str, Any]) -> v2.Compose:
    """Resize so that the centre crop is `crop_pct` of the shorter side, crop, normalise; as the model's library does.

    crop_mode in the preprocessing says which library's rounding is followed ("center" for timm, "torchvision",
    "transformers"); "squash" resizes to the input size without keeping proportions, "border" fits the whole image into
    it and fills the rest with `fill`.
    """
    _, height, width = preprocessing["input_size"]
    crop: torch.nn.Module = v2.CenterCrop((height, width))
    if preprocessing.get("crop_mode") == "transformers":
        crop = CropFromWholeCorner((height, width))
    if preprocessing.get("crop_mode") == "border":
        crop = FillTo((height, width), preprocessing.get("fill", [round(255 * m) for m in preprocessing["mean"]]))
    return v2.Compose([v2.ToImage(), eval_resize(preprocessing), crop, *_normalise(preprocessing)])


def eval_resize(preprocessing: dict[str, Any]) -> torch.nn.Module:
    """The resizing of `eval_transform`. An image that has gone through it is left as it is by a second time."""
    _, height, width = preprocessing["input_size"]
    mode = InterpolationMode(preprocessing["interpolation"])
    crop_pct = preprocessing.get("crop_pct") or 1.0
    size = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    crop_mode = preprocessing.get("crop_mode") or "center"
    if crop_mode == "squash":
        return v2.Resize(size, mode, antialias=True)
    if crop_mode in ("torchvision", "transformers"):
        return v2.Resize(min(size), mode, antialias=True)
    if crop_mode == "border":
        return ResizeToFit((height, width), mode)
    if crop_mode != "center":
        raise ValueError(
            f"crop_mode is center, torchvision, transformers, squash or border, got {preprocessing['crop_mode']!r}"
        )
    return ResizeToCover(size, mode)


def train_resize(preprocessing: dict[str, Any], min_crop: float) -> torch.nn.Module:
    """Shrink images before `train_transform` so far that its smallest crops still have the input's pixels; smaller
    images are left as they are."""
    _, height, width = preprocessing["input_size"]
    mode = InterpolationMode(preprocessing["interpolation"])
    if min_crop == 1 and preprocessing.get("crop_mode") == "squash":
        return v2.Resize((height, width), mode, antialias=True)
    size = (math.ceil(height / math.sqrt(min_crop)), math.ceil(width / math.sqrt(min_crop)))
    return ResizeToCover(size, mode, enlarge=False)


class ResizeToCover(torch.nn.Module):
    """Resize with kept proportions to the smallest size that covers (height, width).

    enlarge=False leaves smaller images alone.
    """

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode, enlarge: bool = True):
        super().__init__()
        self.size, self.interpolation, self.enlarge = size, interpolation, enlarge

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        if scale > 1 and not self.enlarge:
            return image
        size = [max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))]
        return v2.functional.resize(image, size, self.interpolation, antialias=True)


class ResizeToFit(torch.nn.Module):
    """Resize with kept proportions to the largest size that fits into (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        scale = min(self.size[0] / height, self.size[1] / width)
        size = [min(self.size[0], round(height * scale)), min(self.size[1], round(width * scale))]
        return v2.functional.resize(image, size, self.interpolation, antialias=True)


class FillTo(torch.nn.Module):
    """Put the image in the middle of (height, width), and fill what is around it."""

    def __init__(self, size: tuple[int, int], fill: float | list[float]):
        super().__init__()
        self.size, self.fill = size, fill

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        down, right = self.size[0] - image.shape[-2], self.size[1] - image.shape[-1]
        return v2.functional.pad(image, [right // 2, down // 2, right - right // 2, down - down // 2], fill=self.fill)


class CropFromWholeCorner(torch.nn.Module):
    """The centre crop whose corner is cut off to whole pixels, where torchvision rounds it; zeros around a smaller
    image."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        lacking = [max(self.size[1] - image.shape[-1], 0), max(self.size[0] - image.shape[-2], 0)]
        if any(lacking):
            image = v2.functional.pad(image, [*(n // 2 for n in lacking), *(n - n // 2 for n in lacking)])
        down, right = image.shape[-2] - self.size[0], image.shape[-1] - self.size[1]
        return v2.functional.crop(image, down // 2, right // 2, *self.size)


class SwapColours(torch.nn.Module):
    """RGB to BGR."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-3)


def image_mode(preprocessing: dict[str, Any]) -> str:
    """PIL's mode for the model's number of input channels. ValueError for other than 1 or 3."""
    channels = preprocessing["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"image files give 1 or 3 channels, and the model takes {channels}; use ArrayDataset")
    return "RGB" if channels == 3 else "L"


def _normalise(preprocessing: dict[str, Any]) -> list[Any]:
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    swap = [SwapColours()] if preprocessing.get("channel_order") == "bgr" else []
    return [*swap, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
