"""What is measured of segmentation: a confusion matrix of pixels, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class PixelConfusion(Metric):
    """Counts n_ij of pixels of class i that were called j, over all images; ignored pixels are left out.

        IoU_i       = n_ii / (sum_j n_ij + sum_j n_ji - n_ii)
        accuracy_i  = n_ii / sum_j n_ij
        "miou", "mean_accuracy"  means of these over the classes that the data have (sum_j n_ij > 0)
        "pixel_accuracy"         sum_i n_ii / sum_ij n_ij

    A class without a single pixel in the data has IoU and accuracy NaN and is left out of the means; pixels that are
    wrongly called so count against the classes that they belong to. (mmsegmentation counts a class that was predicted
    and is not there as IoU 0.) All are NaN where every pixel is ignored.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, classes: int, ignored: int = 255):
        super().__init__()
        self.classes, self.ignored = classes, ignored
        self.add_state("counts", default=torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, truth: Tensor) -> None:
        """Add classes found (H, W) and true classes (H, W) of one image. ValueError for maps of different sizes."""
        if found.shape != truth.shape:
            raise ValueError(f"a map of {tuple(found.shape)} pixels was measured by a mask of {tuple(truth.shape)}")
        known = truth != self.ignored
        pairs = truth[known].long() * self.classes + found[known].long()
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def confusion(self) -> Tensor:
        """(classes, classes) int64 on the CPU: rows are true classes, columns what was found."""
        return self.counts.cpu()

    def iou(self) -> Tensor:
        """(classes,) float64; NaN for classes that the data do not have."""
        counts = self.confusion().double()
        there, right = counts.sum(1), counts.diagonal()
        return _share(right, there + counts.sum(0) - right, there)

    def accuracy(self) -> Tensor:
        """(classes,) float64; NaN for classes that the data do not have."""
        counts = self.confusion().double()
        return _share(counts.diagonal(), counts.sum(1), counts.sum(1))

    def compute(self) -> dict[str, Tensor]:
        counts = self.confusion().double()
        overall = _share(counts.trace(), counts.sum(), counts.sum())
        values = {"miou": self.iou().nanmean(), "mean_accuracy": self.accuracy().nanmean(), "pixel_accuracy": overall}
        return {name: value.float().to(self.device) for name, value in values.items()}


def _share(part: Tensor, whole: Tensor, there: Tensor) -> Tensor:
    return torch.where(there > 0, part / whole, torch.nan)
