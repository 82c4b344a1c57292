"""Image files decoded once and kept in memory, for training that would otherwise wait for the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from deltalens.data.image_folder import ImageFiles
from deltalens.data.image_items import ImageItems

LIMIT = 10**9


class ImagesInMemory(Dataset):
    """Decoded images, uint8 tensors (C, H, W) of any sizes, with labels. Items are (transform(image), label)."""

    def __init__(self, images: Sequence[Tensor], labels: Sequence[Any], transform: Callable | None = None):
        self.images, self.labels, self.transform = list(images), list(labels), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


def keep_in_memory(
    files: ImageFiles | ImageItems, resize: Callable[[Tensor], Tensor], limit: int = LIMIT
) -> ImageFiles | ImageItems | ImagesInMemory:
    """Decode and resize every image now, where all of them take at most `limit` bytes; otherwise give the files back.

    resize: `train_resize(...)` or `eval_resize(...)` of `deltalens.data.transforms`, to go with their transforms. The
    transform of the files is kept.
    """
    images, size = [], 0
    for index in range(len(files)):
        image = resize(v2.functional.to_image(files.image(index))).as_subclass(torch.Tensor).contiguous()
        size += image.numel()
        if size > limit or image.numel() * len(files) > 4 * limit:  # the second finds big pictures at once
            return files
        images.append(image)
    return ImagesInMemory(images, files.labels, files.transform)
