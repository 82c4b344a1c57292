"""Average precision of several labels an image: over all thresholds, and VOC 2007's at eleven recalls."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def average_precision(scores: Tensor, labels: Tensor, eleven_points: bool = False) -> Tensor:
    """Scores (N, classes), labels (N, classes) of 1, 0 and -1 (left out) -> AP (classes,); NaN for a class that no
    image has.

        precision P(t) and recall R(t) at every distinct score t, from the highest on
        AP        = sum over t of (R(t) - R(t before)) P(t)
        AP_voc07  = mean over r in 0, 0.1 ... 1 of the largest P(t) with R(t) >= r

    Equal scores are one threshold, as in scikit-learn.
    """
    return torch.stack([_of_class(*pair, eleven_points) for pair in zip(scores.T, labels.T, strict=True)])


def _of_class(scores: Tensor, labels: Tensor, eleven_points: bool) -> Tensor:
    known = labels >= 0
    scores, order = scores[known].double().sort(descending=True)
    right = (labels[known] == 1)[order].double()
    if not right.sum():
        return scores.new_tensor(torch.nan)
    last = torch.ones_like(scores, dtype=torch.bool)  # of each run of equal scores
    last[:-1] = scores[1:] != scores[:-1]
    hits = right.cumsum(0)
    precision = (hits / torch.arange(1, len(hits) + 1, device=hits.device))[last]
    recall = (hits / hits[-1])[last]
    if eleven_points:
        levels = torch.arange(11, device=hits.device, dtype=recall.dtype) / 10
        reached = recall >= levels[:, None] - 1e-9
        return torch.where(reached, precision, 0).amax(1).mean()
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return (steps * precision).sum()


class AveragePrecision(Metric):
    """Gathers scores and labels. Gives "mAP" and "mAP_voc07", means over the classes that some image has."""

    full_state_update = False
    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add scores (B, classes) and labels (B, classes)."""
        self.scores.append(scores.detach().float())
        self.labels.append(labels.to(torch.int8))

    def _gathered(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.scores).cpu(), dim_zero_cat(self.labels).cpu()  # sums are in float64: not on MPS

    def per_class(self) -> Tensor:
        """AP (classes,) over all thresholds."""
        return average_precision(*self._gathered())

    def compute(self) -> dict[str, Tensor]:
        points = average_precision(*self._gathered(), eleven_points=True)
        means = {"mAP": self.per_class().nanmean(), "mAP_voc07": points.nanmean()}
        return {name: mean.float().to(self.device) for name, mean in means.items()}
