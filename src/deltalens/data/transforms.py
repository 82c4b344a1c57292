"""Image transforms that follow a model's preprocessing, with torchvision's transforms v2.

`preprocessing` is the dictionary of `deltalens.preprocessing(model)`: input_size (C, H, W), mean, std, interpolation,
crop_pct. Transforms take a PIL image, a uint8 array (H, W, C) or a uint8 tensor (C, H, W) and give a float32 tensor
(C, H, W).
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
    it as fits, with nothing random.
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
    if min_crop == 1:
        steps = [ResizeToCover((height, width), mode), v2.CenterCrop((height, width))]
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if rand_augment:
        steps.append(v2.RandAugment(2, rand_augment, fill=[round(255 * m) for m in preprocessing["mean"]]))
    return v2.Compose([v2.ToImage(), *steps, *_normalise(preprocessing)])


def eval_transform(preprocessing: dict[str, Any]) -> v2.Compose:
    """Resize so that the centre crop is `crop_pct` of the shorter side, crop, normalise; as timm does.

    crop_mode "squash" in the preprocessing resizes to the input size without keeping proportions.
    """
    _, height, width = preprocessing["input_size"]
    resize = eval_resize(preprocessing)
    return v2.Compose([v2.ToImage(), resize, v2.CenterCrop((height, width)), *_normalise(preprocessing)])


def eval_resize(preprocessing: dict[str, Any]) -> torch.nn.Module:
    """The resizing of `eval_transform`. An image that has gone through it is left as it is by a second time."""
    _, height, width = preprocessing["input_size"]
    mode = InterpolationMode(preprocessing["interpolation"])
    crop_pct = preprocessing.get("crop_pct") or 1.0
    size = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    if preprocessing.get("crop_mode") == "squash":
        return v2.Resize(size, mode, antialias=True)
    return ResizeToCover(size, mode)


def train_resize(preprocessing: dict[str, Any], min_crop: float) -> torch.nn.Module:
    """Shrink images before `train_transform` so far that its smallest crops still have the input's pixels; smaller
    images are left as they are."""
    _, height, width = preprocessing["input_size"]
    size = (math.ceil(height / math.sqrt(min_crop)), math.ceil(width / math.sqrt(min_crop)))
    return ResizeToCover(size, InterpolationMode(preprocessing["interpolation"]), enlarge=False)


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


def image_mode(preprocessing: dict[str, Any]) -> str:
    """PIL's mode for the model's number of input channels. ValueError for other than 1 or 3."""
    channels = preprocessing["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"image files give 1 or 3 channels, and the model takes {channels}; use ArrayDataset")
    return "RGB" if channels == 3 else "L"


def _normalise(preprocessing: dict[str, Any]) -> list[Any]:
    mean, std = list(preprocessing["mean"]), list(preprocessing["std"])
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
