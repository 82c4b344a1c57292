"""What a wrong oriented box costs: of its codes, of its Gaussian, or of its overlap."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from deltalens.backbones.dense.oriented_coder import OrientedCoder
from deltalens.models.oriented_gaussians import gaussian_loss, gwd, kld
from deltalens.models.oriented_iou import paired_iou


def l1(coder: OrientedCoder, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """The sum of |codes - codes of the true box| over the five numbers."""
    return functional.l1_loss(codes, coder.encode(boxes, anchors), reduction="none").sum(-1)


def smooth_l1(coder: OrientedCoder, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """The same, with half the square of differences below 1."""
    return functional.smooth_l1_loss(codes, coder.encode(boxes, anchors), reduction="none").sum(-1)


def gaussian_kld(coder: OrientedCoder, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """1 - 1 / (1 + log(1 + D)), D = 2 KL(found || true) of the boxes' Gaussians (Yang et al., NeurIPS 2021, arXiv
    2106.01883): mmrotate's GDLoss_v1 with kld, log1p and tau 1, as its configurations have it."""
    return gaussian_loss(2 * kld(coder.decode(codes, anchors), boxes))


def gaussian_gwd(coder: OrientedCoder, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """1 - 1 / (1 + log(1 + D)), D = the squared Wasserstein distance of the Gaussians, in square pixels (Yang et al.,
    ICML 2021, arXiv 2101.11952). mmrotate's configurations of it take the root instead of the logarithm, tau 2 and five
    times the weight."""
    return gaussian_loss(gwd(coder.decode(codes, anchors), boxes))


def overlap(coder: OrientedCoder, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """1 - IoU of the oriented boxes."""
    return 1 - paired_iou(coder.decode(codes, anchors), boxes)


BOX_LOSSES: dict[str, Callable[[OrientedCoder, Tensor, Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "smooth_l1": smooth_l1,
    "kld": gaussian_kld,
    "gwd": gaussian_gwd,
    "iou": overlap,
}
"""Name -> a function (coder, codes (n, 5), anchors (n, 5), true boxes (n, 5)) -> (n,)."""
