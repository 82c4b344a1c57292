"""RPO (Lee et al., Read-only prompt optimization for few-shot learning, ICCV 2023, arXiv 2308.14960)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltalens.backbones.two_towers import two_towers_of
from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.context import text_owner
from deltalens.methods.two_towers import check_added, embedding_site, image_tower
from deltalens.sites.anatomy import require
from deltalens.sites.layout import Layout, Words


def _places(layout: Words, count: int) -> Tensor:
    """(n, K): the places right behind the end of each text."""
    ends = layout.ends
    if ends is None:
        raise RuntimeError("the ends of the texts are unknown: let the classifier made of class names run them")
    return ends[:, None] + 1 + torch.arange(count, device=ends.device)


class WordsBehindTheEnd(nn.Module):
    """`text.embed`: K learned words without positions behind the end of each text. words (K, d)."""

    def __init__(self, words: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(words)
        self.room = len(words)

    def forward(self, x: Tensor, layout: Words) -> Tensor:
        places = _places(layout, self.room)
        if int(places.max()) >= x.shape[1]:
            raise ValueError(
                f"RPO writes {self.room} words behind the end of each text, and the longest text leaves room for "
                f"{x.shape[1] - 1 - int(layout.ends.max())}: use fewer prompts or shorter names"
            )
        rows = torch.arange(len(x), device=x.device)[:, None]
        return x.index_put((rows, places), self.prompt.to(x.dtype).expand(len(x), -1, -1))


class UnreadBehindTheEnd(nn.Module):
    """`attention.mask` of the text tower: what stands behind a text's end is read by nobody."""

    def forward(self, mask: Tensor, x: Tensor, layout: Words) -> Tensor:
        visible = (torch.arange(x.shape[1], device=x.device) <= layout.ends[:, None])[:, None, None]
        return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))


class WordsRead(nn.Module):
    """`text.pool`: the K words behind the end, (n, L, d) -> (n, K, d)."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor, layout: Words) -> Tensor:
        return x[torch.arange(len(x), device=x.device)[:, None], _places(layout, self.count)]


class TokensBehindThePrefix(nn.Module):
    """`embed`: K learned tokens without positions. tokens (K, C)."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(tokens)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.insert(x, self.prompt[None])


class UnreadTokens(nn.Module):
    """`attention.mask` of the image tower: the K tokens behind the prefix are read by nobody."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, mask: Tensor | None, x: Tensor, layout: Layout) -> Tensor:
        check_added(x, layout, self.count, "RPO")
        place = torch.arange(x.shape[1], device=x.device)
        visible = ((place < layout.prefix) | (place >= layout.prefix + self.count))[None, None, None]
        if mask is None:
            return visible
        return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))


class TokensRead(nn.Module):
    """`pool`: the K tokens behind the prefix, (B, N, C) -> (B, K, C)."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x[:, layout.prefix : layout.prefix + self.count]


def _around(token: Tensor, count: int, noise: float) -> Tensor:
    """(count, d): a token, and in each row another direction of that length added."""
    directions = torch.randn(count, len(token), device=token.device, dtype=token.dtype)
    return token.detach() + noise * directions / directions.norm(dim=-1, keepdim=True)


@register("rpo")
class RPOConfig(Method):
    """K learned tokens in each tower that read the others and are read by nobody: features stay those of CLIP inside.

        text of class c = start, words, name, ".", end, p_1 ... p_K          p (K, d), without positions
        image           = class token, v_1 ... v_K, patches                  v (K, C), without positions
        masks             every token reads what it read before and no prompt; prompts read all that are no prompts
        logit(x, c)     = mean over k of exp(logit_scale) cos(image_k(x), text_k(c))

    image_k and text_k are what the k-th prompt has become behind the last block, normed and projected. Prompts begin as
    the embedding of the end (text) and the class token (image) plus a random vector of length 0.1 each.

    Published settings: K = 24, "a photo of a {}.", SGD 0.01, batch 4, 15 epochs. Parameters: K (d + C), on ViT-B/16
    30,720. A text has to leave K places behind its end. ResNet towers are refused.
    """

    learning_rate: ClassVar = 1e-2

    num_prompts: int = setting(default=24, help="learned tokens K in each tower")
    noise: float = setting(default=0.1, help="length of the random vectors in the first values")

    def __post_init__(self):
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")

    def place(self, anatomy) -> Iterator[Placement]:
        owner, model, reading = text_owner(anatomy, "text.embed", "RPO")
        vision, count = image_tower(anatomy, "RPO"), self.num_prompts
        class_token = two_towers_of(model.clip).class_token(model.clip)
        if class_token is None or vision.owner is None:
            raise TypeError(f"RPO needs an image tower with a class token, which {type(model.clip).__name__} lacks")
        empty = model.tokenizer([""])
        end = empty[0, int(reading.ends(model.clip, empty)[0])]
        table = reading.tokens(model.clip)
        with torch.no_grad():
            end_token = table(end.to(table.weight.device))
        yield owner, "text.embed", WordsBehindTheEnd(_around(end_token, count, self.noise))
        yield owner, "text.pool", WordsRead(count)
        site = embedding_site(vision, "RPO", model)
        yield site, "embed", TokensBehindThePrefix(_around(class_token, count, self.noise))
        yield vision.owner, "pool", TokensRead(count)
        for tower, mask in ((owner.tower, UnreadBehindTheEnd()), (vision, UnreadTokens(count))):
            for block in tower.blocks:
                require(block, "attention.mask", "RPO", model)
                yield block, "attention.mask", mask
