"""Images that are already in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class ArrayDataset(Dataset):
    """Images and labels held in memory. Items are (transform(image), label) with image a uint8 tensor (C, H, W).

    images: numpy (N, H, W), (N, H, W, C) or torch (N, C, H, W); uint8, or floats in [0, 1], which become uint8.
    Gray images are repeated to three channels. labels: N integers.

    Raises ValueError for lengths that differ, other shapes, other value ranges, negative labels.
    """

    def __init__(self, images: np.ndarray | Tensor, labels: Sequence[int], transform: Callable | None = None):
        self.images = _as_bytes(images)
        self.labels = [int(label) for label in labels]
        self.transform = transform
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.labels and min(self.labels) < 0:
            raise ValueError(f"labels must be 0, 1, 2..., found {min(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]

    def subset(self, indices: Sequence[int]) -> ArrayDataset:
        """The items at these indices, as a dataset of their own."""
        indices = list(indices)
        return ArrayDataset(self.images[indices], [self.labels[i] for i in indices], self.transform)


def _as_bytes(images: np.ndarray | Tensor) -> Tensor:
    """(N, C, H, W), uint8, three channels where there was one."""
    channels_last = not torch.is_tensor(images)
    images = torch.as_tensor(images)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.dim() == 4 and channels_last:
        images = images.permute(0, 3, 1, 2)
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be numpy (N, H, W), (N, H, W, 1 or 3) or torch (N, 1 or 3, H, W), got {tuple(images.shape)}"
        )
    if images.is_floating_point():
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            raise ValueError(f"float images must lie in [0, 1], found {low:g} to {high:g}; divide them, or pass uint8")
        images = (images * 255).round()
    elif images.dtype != torch.uint8:
        low, high = int(images.min()), int(images.max())
        if low < 0 or high > 255:
            raise ValueError(f"integer images must lie in 0 to 255, found {low} to {high}")
    images = images.to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
