"""ReCon's block: class tokens that read the patches, and are not read by them."""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class CrossAttention(nn.Module):
    """Queries of x (B, M, C), keys and values of y (B, N, C); no biases but the last layer's."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, N, head_dim) each."""
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def read(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.read(x, *self.keys_values(y))


class TwoStreamBlock(nn.Module):
    """Of x (B, N, C) the first `prefix` tokens c are one stream, the others v another; each has layers of its own.

        c = norm1'(c);  v = norm1(v)
        c <- c + cross(c, v);  v <- v + attn(v)
        c = norm2'(c);  v = norm2(v)
        c <- c + mlp'(c);  v <- v + mlp(v)

    As in the official code what is added to is the normed stream, not x. The layers of c are named `_contrast`. While
    ReCon is pretrained, c reads v without gradients to it; here they flow, as in its fine-tuning. Drop path drops both
    streams of a sample, in the official code each by itself.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, prefix: int = 3):
        super().__init__()
        self.prefix = prefix
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm1_contrast, self.norm2_contrast = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=False)
        self.attn_contrast = CrossAttention(dim, num_heads)
        self.mlp, self.mlp_contrast = Mlp(dim, 4 * dim), Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def norm_streams(self, x: Tensor, of_class: nn.Module, of_patches: nn.Module) -> Tensor:
        """Both streams through layers of their own, put together again."""
        return torch.cat([of_class(x[:, : self.prefix]), of_patches(x[:, self.prefix :])], 1)

    def attend(self, normed: Tensor) -> Tensor:
        class_tokens, patches = normed[:, : self.prefix], normed[:, self.prefix :]
        return torch.cat([self.attn_contrast(class_tokens, patches), self.attn(patches)], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_streams(x, self.norm1_contrast, self.norm1)
        x = x + self.drop_path(self.attend(x))
        x = self.norm_streams(x, self.norm2_contrast, self.norm2)
        return x + self.drop_path(self.norm_streams(x, self.mlp_contrast, self.mlp))
