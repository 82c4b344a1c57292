"""Images that another dataset loads: torchvision's and those of the `datasets` library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


class ImageItems(Dataset):
    """Images got from `load(key)` as PIL images or arrays, with labels. Items are (transform(image), label).

    items: (load, key) pairs. mode: PIL's mode that images are converted to. As `ImageFiles` but for the files.
    """

    def __init__(
        self,
        items: Sequence[tuple[Callable[[Any], Any], Any]],
        labels: Sequence[Any],
        transform: Callable | None = None,
        mode: str = "RGB",
    ):
        self.items, self.labels, self.transform, self.mode = list(items), list(labels), transform, mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.labels[index]

    def __add__(self, other: ImageItems) -> ImageItems:
        """The items of both, with the transform and the mode of the first."""
        return ImageItems(self.items + other.items, [*self.labels, *other.labels], self.transform, self.mode)

    def image(self, index: int) -> Image.Image:
        """One image in `mode`, without the transform."""
        load, key = self.items[index]
        image = load(key)
        if torch.is_tensor(image):
            image = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return image.convert(self.mode)

    def subset(self, indices: Sequence[int]) -> ImageItems:
        """The items at these indices, as a dataset of their own."""
        return ImageItems(
            [self.items[i] for i in indices], [self.labels[i] for i in indices], self.transform, self.mode
        )
