"""Batched augmentation: random resized crop and flip in one `grid_sample`, colour jitter, erasing, normalisation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 or float images in 0..255 to ImageNet statistics."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device).view(3, 1, 1) * 255
    return (images.float() - mean) / std


def for_evaluation(images: torch.Tensor, size: int) -> torch.Tensor:
    """Whole images resized to `size` as the models' pretrained cfg asks (bicubic, crop 1.0) and normalised."""
    images = images.float()
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return normalize(images)


@dataclass
class Augment:
    """Strengths of the training augmentation; `__call__` takes uint8 (N, 3, H, W) and returns normalised floats."""

    min_area: float = 0.5
    max_aspect: float = 4 / 3
    color_jitter: float = 0.2
    erasing: float = 0.0

    def __call__(self, images: torch.Tensor, size: int) -> torch.Tensor:
        images = self._crop_and_flip(images.float(), size)
        if self.color_jitter:
            images = self._jitter(images)
        images = normalize(images)
        if self.erasing:
            images = self._erase(images)
        return images

    def _crop_and_flip(self, images: torch.Tensor, size: int) -> torch.Tensor:
        n, device = len(images), images.device
        area = torch.empty(n, device=device).uniform_(self.min_area, 1.0)
        log_aspect = torch.empty(n, device=device).uniform_(-1, 1) * torch.tensor(self.max_aspect).log().item()
        width = (area * log_aspect.exp()).sqrt().clamp(max=1.0)
        height = (area / log_aspect.exp()).sqrt().clamp(max=1.0)
        flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
        theta[:, 0, 2] = torch.empty(n, device=device).uniform_(-1, 1) * (1 - width)
        theta[:, 1, 2] = torch.empty(n, device=device).uniform_(-1, 1) * (1 - height)
        grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _jitter(self, images: torch.Tensor) -> torch.Tensor:
        """Brightness, contrast and saturation, each scaled by a factor in 1 -+ color_jitter."""
        brightness, contrast, saturation = (
            1 + torch.empty(3, len(images), 1, 1, 1, device=images.device).uniform_(-1, 1) * self.color_jitter
        )
        images = images * brightness
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
        images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
        return images.clamp_(0, 255)

    def _erase(self, images: torch.Tensor) -> torch.Tensor:
        """One rectangle of 1/50 to 1/4 of the area set to the mean colour, in a share `erasing` of the images."""
        n, _, height, width = images.shape
        side = torch.empty(2, n, 1, device=images.device).uniform_(0.14, 0.5)
        start = torch.rand(2, n, 1, device=images.device) * (1 - side)
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        cols = (torch.arange(width, device=images.device) + 0.5) / width
        in_rows = (rows >= start[0]) & (rows < start[0] + side[0])
        in_cols = (cols >= start[1]) & (cols < start[1] + side[1])
        chosen = torch.rand(n, 1, 1, device=images.device) < self.erasing
        return images.masked_fill((in_rows[:, :, None] & in_cols[:, None, :] & chosen)[:, None], 0.0)
