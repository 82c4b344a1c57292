"""Oriented boxes as Gaussians, the distances of these, and losses of the distances.

    mean = (cx, cy),  covariance = R diag(w^2 / 4, h^2 / 4) R^T,  R the rotation by the angle.

A Gaussian has no order of sides and no end of an angle's range: (w, h, a), (h, w, a + pi/2) and (w, h, a + pi) are the
same, so a regression through it meets no jump. Squares have no angle, and give it no gradient.

Papers: GWD, Yang et al., ICML 2021, arXiv 2101.11952; KLD, Yang et al., NeurIPS 2021, arXiv 2106.01883.

Both distances are written in the frame of one of the boxes, so that no covariance is inverted and no determinant
rounds to 0: a box 1,000 times as long as wide is held in float32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LEAST_SIDE = 1e-3  # pixels; shorter sides count as this long
Damping = Literal["log1p", "sqrt", "none"]


def gaussians_of(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Means (..., 2) and covariances (..., 2, 2) of boxes (..., 5)."""
    mean, w, h, cos, sin = _parts(boxes)
    p, q = (w / 2).square(), (h / 2).square()
    cross = (p - q) * cos * sin
    first, second = p * cos.square() + q * sin.square(), p * sin.square() + q * cos.square()
    return mean, torch.stack([torch.stack([first, cross], -1), torch.stack([cross, second], -1)], -2)


def kld(first: Tensor, second: Tensor) -> Tensor:
    """D(first || second) (...,) of the Gaussians of boxes (..., 5) and (..., 5), row by row; not symmetric.

        D = 1/2 (d^T S2^-1 d + tr(S2^-1 S1) + ln(|S2| / |S1|)) - 1,  d the difference of the means.

    In the frame of second, with d = (dx, dy), the angle t between them and sides w1, h1 and w2, h2:

        D = 2 (dx / w2)^2 + 2 (dy / h2)^2 + ln(w2 h2 / (w1 h1)) - 1
            + ((w1 cos t)^2 + (h1 sin t)^2) / (2 w2^2) + ((w1 sin t)^2 + (h1 cos t)^2) / (2 h2^2)

    mmrotate's `GDLoss_v1` (its "kld" configurations) takes 2 D(predicted || target), its `GDLoss` ("kld-stable")
    D(target || predicted) and by default the root of it. Both clamp sides to at least 1e-7, the covariances'
    determinants are products of squares, and thin boxes lose them in float32; here sides are at least LEAST_SIDE.
    """
    mean, w, h, cos, sin = _parts(first)
    other_mean, other_w, other_h, other_cos, other_sin = _parts(second)
    x, y = (mean - other_mean).unbind(-1)
    dx, dy = x * other_cos + y * other_sin, y * other_cos - x * other_sin
    turn = first[..., 4].to(mean.dtype) - second[..., 4].to(mean.dtype)
    cos, sin = turn.cos(), turn.sin()
    shift = (dx / other_w).square() + (dy / other_h).square()
    wide = (w / other_w * cos).square() + (h / other_w * sin).square()
    high = (w / other_h * sin).square() + (h / other_h * cos).square()
    sizes = (other_w / w).log() + (other_h / h).log()
    return (2 * shift + (wide + high) / 2 + sizes - 1).clamp(min=0)


def gwd(first: Tensor, second: Tensor) -> Tensor:
    """Squared Wasserstein distance (...,), in square pixels, of the Gaussians of boxes (..., 5) and (..., 5).

        |d|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

    Of 2 x 2 matrices the last trace is (tr(S1 S2) + 2 |S1 S2|^1/2)^1/2. With t the angle between the boxes and

        s = w1 w2 + h1 h2,  c = ((s cos t)^2 + ((w1 h2 + h1 w2) sin t)^2)^1/2

    it is c / 4, and without differences of large numbers the distance is

        |d|^2 + ((w1 - w2)^2 + (h1 - h2)^2) / 4 + (w1^2 - h1^2) (w2^2 - h2^2) (sin t)^2 / (2 (s + c)).

    mmrotate's `GDLoss` divides the distance by 2 (|S1| |S2|)^1/8 (its normalize=True), `GDLoss_v1` does not.
    """
    mean, w, h, _, _ = _parts(first)
    other_mean, other_w, other_h, _, _ = _parts(second)
    turn = first[..., 4].to(mean.dtype) - second[..., 4].to(mean.dtype)
    same, crossed, sin = w * other_w + h * other_h, w * other_h + h * other_w, turn.sin()
    coupling = ((same * turn.cos()).square() + (crossed * sin).square()).sqrt()  # > 0, as sides are
    longer = (w - h) * (w + h) * (other_w - other_h) * (other_w + other_h)
    turned = longer * sin.square() / (same + coupling) / 2
    resized = ((w - other_w).square() + (h - other_h).square()) / 4
    return ((mean - other_mean).square().sum(-1) + resized + turned).clamp(min=0)


def gaussian_loss(distance: Tensor, damping: Damping = "log1p", tau: float = 1.0) -> Tensor:
    """1 - 1 / (tau + f(distance)), f = ln(1 + .), root, or none; from 1 - 1 / tau for equal boxes to 1.

    tau >= 1, as in the papers; they take f = ln(1 + .) and tau = 1 for KLD, ln(1 + .) or the root for GWD. The root is
    taken of at least 1e-6 (as in `GDLoss_v1`), where its gradient is finite.
    """
    if damping not in get_args(Damping):
        raise ValueError(f"unknown damping {damping!r}; known: {', '.join(get_args(Damping))}")
    if tau < 1:
        raise ValueError(f"tau must be at least 1, got {tau}")
    if damping == "log1p":
        distance = distance.log1p()
    elif damping == "sqrt":
        distance = distance.clamp(min=1e-6).sqrt()
    return 1 - 1 / (tau + distance)


def _parts(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centre, sides, cosine and sine, in float32 or float64."""
    if boxes.shape[-1] != 5:
        raise ValueError(f"boxes must be (..., 5), (cx, cy, w, h, angle), got {tuple(boxes.shape)}")
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    w, h = boxes[..., 2].clamp(min=LEAST_SIDE), boxes[..., 3].clamp(min=LEAST_SIDE)
    return boxes[..., :2], w, h, boxes[..., 4].cos(), boxes[..., 4].sin()
