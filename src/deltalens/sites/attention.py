"""Scaled dot-product attention, fused or not, as the backbone's own layer is set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Keep = int | Tensor  # the tokens of a block's output that somebody reads


def kept(x: Tensor, keep: Keep) -> Tensor:
    """The tokens of (B, N, C) that are read: the first `keep`, or, where keep is a tensor (B,), one of each sample at
    that position, as (B, 1, C). A copy: a view that backward saves would keep all tokens in memory."""
    if isinstance(keep, int):
        return x[:, :keep].clone()
    return x[torch.arange(len(x), device=x.device), keep][:, None]


def kept_rows(mask: Tensor, keep: Keep) -> Tensor:
    """The rows of a mask (N, S) or (B, heads or 1, N, S) that belong to the queries of `kept`."""
    if isinstance(keep, int):
        return mask[..., :keep, :]
    if mask.dim() == 2:
        return mask[keep][:, None, None]
    mask = mask.expand(len(keep), -1, -1, -1)
    return mask[torch.arange(len(keep), device=mask.device), :, keep][:, :, None]


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
