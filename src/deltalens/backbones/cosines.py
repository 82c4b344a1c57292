"""Logits of normalised features of images and classes."""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(features: Tensor, texts: Tensor) -> Tensor:
    """Normalised image features (B, D) with (C, D) or (B, C, D); (B, K, D) with (C, K, D), mean over the pairs."""
    if features.dim() == 3:
        return torch.einsum("bkd,ckd->bck", features, texts.to(features.dtype)).mean(-1)
    if texts.dim() == 3:
        return torch.einsum("bd,bcd->bc", features, texts.to(features.dtype))
    return features @ texts.to(features.dtype).T
