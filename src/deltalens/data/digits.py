"""scikit-learn's handwritten digits: 1,797 grey scans of 8 x 8 pixels that need no download.

The scans come with scikit-learn (a copy of the test half of UCI's "Optical Recognition of Handwritten Digits", from
13 writers). Here they are enlarged smoothly, so that a backbone that has seen photographs meets strokes and not a
mosaic, and split once into train, val and test with every class in its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_IMAGES, VAL_IMAGES = 500, 200
BRIGHTEST = 16  # the scans count black pixels in 4 x 4 cells
SCAN_PIXELS, MARGIN_PIXELS = 8, 1


@dataclass(frozen=True)
class Images:
    """Images with their classes. images: uint8 (N, size, size, 3); labels: int64 (N,), indices into the class names."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """The three splits, disjoint, and the names of the ten classes in the order of the labels."""

    train: Images
    val: Images
    test: Images
    class_names: tuple[str, ...] = CLASS_NAMES


def load_digits(size: int = 48, train_images: int | None = None, split_seed: int = 0) -> Digits:
    """Enlarge and split the scans: 1,097 for training, 200 for validation, 500 for the test.

    size: edge of the square images. train_images: how many to train on, as equal a number of every class as there
    are; None takes all. A smaller number takes a part of what a larger one takes, and val and test stay the same.
    split_seed: which scans go where; the same seed gives the same splits everywhere.

    Raises ValueError for a size below 8 or a number of training images outside 10 to 1,097.
    """
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import train_test_split

    if size < SCAN_PIXELS:
        raise ValueError(f"size must be at least {SCAN_PIXELS} pixels, the edge of a scan, got {size}")
    scans, labels = load_scans(return_X_y=True)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=split_seed
    )
    train, val = train_test_split(rest, test_size=VAL_IMAGES, stratify=labels[rest], random_state=split_seed)
    train = _classes_in_turn(train, labels)
    if train_images is not None:
        if not len(CLASS_NAMES) <= train_images <= len(train):
            raise ValueError(
                f"train_images must be between {len(CLASS_NAMES)} (one of each class) and {len(train)}, "
                f"got {train_images}"
            )
        train = train[:train_images]
    images = enlarge(scans.reshape(-1, SCAN_PIXELS, SCAN_PIXELS), size)
    parts = [Images(images[index], labels[index].astype(np.int64)) for index in (train, val, test)]
    return Digits(train=parts[0], val=parts[1], test=parts[2])


def enlarge(scans: np.ndarray, size: int) -> np.ndarray:
    """Scans (N, 8, 8) with values 0 to 16 -> uint8 (N, size, size, 3), light strokes on black with a margin,
    bicubic."""
    grey = torch.from_numpy(scans).float()[:, None] / BRIGHTEST
    grey = F.pad(grey, [MARGIN_PIXELS] * 4)
    grey = F.interpolate(grey, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    return (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def _classes_in_turn(index: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reorder so that every beginning of the order is as balanced over the classes as can be."""
    turn = np.empty(len(index), dtype=np.int64)
    for label in np.unique(labels[index]):
        members = np.flatnonzero(labels[index] == label)
        turn[members] = np.arange(len(members))
    return index[np.lexsort((labels[index], turn))]
