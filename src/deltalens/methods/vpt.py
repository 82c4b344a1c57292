"""VPT, visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, Site, require


class Prompts(nn.Module):
    """p learned tokens of a stream, (1, p, C), or (B, p, C) where dropout draws a mask per sample.

    Initialised U(-v, v) with v = sqrt(6 / (3 * patch_height * patch_width + C_0)), C_0 being the width of the first
    block, which the official code uses for all stages of hierarchical models too.
    """

    pointwise = True

    def __init__(self, num_tokens: int, dim: int, bound: float, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num_tokens, dim).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., C): only its batch size is read, and only while dropout is active."""
        tokens = self.embedding.unsqueeze(0)
        if self.training and self.dropout.p:
            tokens = self.dropout(tokens.expand(x.shape[0], -1, -1))
        return tokens


class InsertedPrompts(Prompts):
    """Prompts that join the stream after its prefix tokens and live on through the blocks."""

    def forward(self, x: Tensor, layout) -> Tensor:
        return layout.insert(x, super().forward(x))


@register("vpt")
class VPTConfig(Method):
    """Learned tokens beside the patch tokens, in the first block (shallow) or in every block (deep); head trained.

    shallow: p tokens (1, p, C) enter before block 0, after the position embedding, and live on through all blocks.
    deep: block i gets its own p tokens, and what block i-1 made of its prompts is dropped. A prompt then only matters
    as a key and
    a value of block i's attention: K = W_k LN(P) + b_k, V = W_v LN(P) + b_v. Exactly that is computed here, without
    queries, attention rows or MLP for prompts; outputs and gradients are those of the published form.

    Parameters: p C (shallow), p * (sum of block widths) (deep); ViT-B, p=50: 38,400 and 460,800. On Swin, prompts are
    copied
    into every window with zero relative-position bias; the head pools the prompts that leave the last block together
    with the map, as published. The official Swin code mixes prompts between samples of a batch; this one does not.
    dropout: on the prompts, a mask per sample and block (the paper uses 0.1 for deep).
    """

    learning_rate: ClassVar = 1e-2

    num_tokens: int = setting(default=50, help="prompts per prompted block, p")
    deep: bool = setting(default=True, help="prompts in every block instead of the first only")
    dropout: float = setting(default=0.0, help="dropout on the prompts, one mask per sample")

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def place(self, anatomy: Anatomy):
        for tower in anatomy.towers:
            bound = init_bound(tower.patch_size or (16, 16), tower.blocks[0].width)
            for block in tower.blocks if self.deep else tower.blocks[:1]:
                yield self._place_in(block, bound, anatomy)

    def _place_in(self, block: Site, bound: float, anatomy: Anatomy):
        pooled = block.is_last and bool(block.tower.carriers)  # the head pools what becomes of the last prompts
        slot = "attention.prompts" if self.deep and not pooled else "tokens.in"
        require(block, slot, f"VPT-{'deep' if self.deep else 'shallow'}", anatomy.model)
        cls = Prompts if slot == "attention.prompts" else InsertedPrompts
        return block, slot, cls(self.num_tokens, block.width, bound, self.dropout)


def init_bound(patch_size: tuple[int, int], width: int) -> float:
    """v of U(-v, v): Xavier's bound of the patch embedding's convolution."""
    return math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + width))
