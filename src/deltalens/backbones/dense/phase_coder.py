"""Angles as phase-shifted cosines, which have no end where they jump."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 3


def encode_angles(angles: Tensor) -> Tensor:
    """The phase-shifting coder (Yu & Da, CVPR 2023, arXiv 2211.06368) with three steps: (...,) -> (..., 3).

    x_k = cos(2 angle + 2 pi k / 3),  k = 0, 1, 2
    """
    return torch.cos(2 * angles[..., None] + _shifts(angles))


def decode_angles(codes: Tensor) -> Tensor:
    """Angles (...,) in [-pi/2, pi/2] of any codes (..., 3), whose length does not count; differentiable.

        angle = -atan2(sum_k x_k sin(2 pi k / 3), sum_k x_k cos(2 pi k / 3)) / 2

    Codes without a phase, all three equal, are angle 0, without a gradient. The coder's second frequency and its
    threshold, which give square-like objects angle 0, are not here: H2RBox-v2 uses neither.
    """
    shifts = _shifts(codes)
    sine, cosine = (codes * shifts.sin()).sum(-1), (codes * shifts.cos()).sum(-1)
    none = (sine == 0) & (cosine == 0)
    return -torch.atan2(torch.where(none, 0, sine), torch.where(none, 1, cosine)) / 2


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(STEPS, dtype=like.dtype, device=like.device) * (2 * math.pi / STEPS)
