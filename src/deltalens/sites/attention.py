"""Scaled dot-product attention, fused or not, as the backbone's own layer is set."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, fused: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for (B, heads, N, d) tensors; mask is boolean (True: visible) or additive.

    fused: use PyTorch's kernel. timm layers carry the choice as `fused_attn`; the plain form keeps the attention matrix
    for backward, and is the faster one for training on many CPUs (`timm.layers.set_fused_attn(False)`).
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ v
