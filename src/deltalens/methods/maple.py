"""MaPLe (Khattak et al., Multi-modal prompt learning, CVPR 2023, arXiv 2210.03117)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.context import Context, first_words, text_owner
from deltalens.methods.two_towers import check_added, embedding_site, image_tower, replaced
from deltalens.sites.anatomy import require


class DeepWords(nn.Module):
    """`words.in`: learned words take the places of those behind the start. words (m, d)."""

    def __init__(self, words: Tensor):
        super().__init__()
        self.ctx = nn.Parameter(words)

    def forward(self, x: Tensor, layout) -> Tensor:
        return replaced(x, self.ctx, 1)


class CoupledTokens(nn.Module):
    """`embed`: tokens proj(words) behind the class token. words: the module of the text tower that holds `ctx`."""

    def __init__(self, words: nn.Module, width: int):
        super().__init__()
        self.words = words
        self.proj = nn.Linear(words.ctx.shape[-1], width)

    def forward(self, x: Tensor, layout) -> Tensor:
        return layout.insert(x, self.proj(self.words.ctx)[None])


class DeepTokens(CoupledTokens):
    """`tokens.in`: the same in the places of the tokens that are there."""

    def forward(self, x: Tensor, layout) -> Tensor:
        check_added(x, layout, len(self.words.ctx), "MaPLe")
        return replaced(x, self.proj(self.words.ctx), layout.prefix)


@register("maple")
class MaPLeConfig(Method):
    """Learned words in the text tower, and tokens made of them in the image tower, anew in each of the first blocks.

        text, block 1:     start, P_1, rest of the template, name, ".", end          P_i (m, d)
        image, block 1:    class token, P_1 W_1^T + b_1, patches                     W_i (C, d), before the first norm
        blocks i = 2 ... depth, at their input: P_i in the places of the words, P_i W_i^T + b_i in those of the tokens

    From block depth + 1 on both pass like any other token. The first m words of `init` are the first values of P_1 and
    stand in its place: with "a photo of a" and m = 2 the text goes on "of a {name}.". Deep words begin as N(0, 0.02);
    without `init`, so does P_1. In towers of different depth blocks count from the bottom.

    Published settings: m = 2, SGD, batch 4; depth 9, 0.0035, 5 epochs for base-to-novel, depth 3, 0.0026, 2 epochs
    across data sets (`MaPLeConfig.cross_dataset()`). The official code works in half precision only, and for widths 512
    and 768. Parameters: depth (m d + d C + C), on ViT-B/16 3,555,072 for depth 9 and 1,185,024 for depth 3. ResNet
    towers are refused.
    """

    learning_rate: ClassVar = 3.5e-3

    num_words: int = setting(default=2, help="learned words m in each block")
    depth: int = setting(default=9, help="blocks from the first on with words and tokens of their own")
    init: str | None = setting(default="a photo of a", help="a text whose words are the first values; null draws them")

    @classmethod
    def cross_dataset(cls) -> MaPLeConfig:
        """What the paper trains on ImageNet for other data sets: depth 3."""
        return cls(depth=3)

    def __post_init__(self):
        if self.num_words < 1 or self.depth < 1:
            raise ValueError(f"num_words and depth must be at least 1, got {self.num_words} and {self.depth}")

    def place(self, anatomy) -> Iterator[Placement]:
        owner, model, reading = text_owner(anatomy, "text.context", "MaPLe")
        vision = image_tower(anatomy, "MaPLe")
        text, width = owner.tower, vision.blocks[0].width
        blocks = min(len(text.blocks), len(vision.blocks))
        if self.depth > blocks:
            raise ValueError(f"depth={self.depth} is beyond the {blocks} blocks that both towers have")
        words, template = first_words(model, reading, self.num_words, self.init)
        if len(words) < self.num_words:
            raise ValueError(f"num_words={self.num_words}, and init {self.init!r} has {len(words)} tokens")
        first = Context(words[: self.num_words].clone(), template)
        yield owner, "text.context", first
        yield embedding_site(vision, "MaPLe", model), "embed", CoupledTokens(first, width)
        for below, above in zip(text.blocks[1 : self.depth], vision.blocks[1 : self.depth], strict=True):
            require(below, "words.in", "MaPLe", model)
            deep = DeepWords(nn.init.normal_(torch.empty_like(first.ctx), std=0.02))
            yield below, "words.in", deep
            yield above, "tokens.in", DeepTokens(deep, width)
