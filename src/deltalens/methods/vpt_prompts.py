"""The learned tokens of VPT."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.sites.layout import Layout


def init_bound(patch_size: tuple[int, int], width: int) -> float:
    """v of U(-v, v): Xavier's bound of the patch embedding's convolution."""
    return math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + width))


def hold(module: nn.Module, name: str, tensor: Tensor, trained: bool) -> None:
    """Register a tensor as a parameter, or as a buffer that files hold and nobody trains."""
    if trained:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


class Projection(nn.ModuleDict):
    """Narrow prompts (..., k) -> (..., C): one nn.Linear with bias for each width C of the stream."""

    def __init__(self, dim: int, widths: Iterable[int]):
        super().__init__({str(width): nn.Linear(dim, width) for width in dict.fromkeys(widths)})
        for layer in self.values():
            nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out")

    def forward(self, tokens: Tensor, width: int) -> Tensor:
        return self[str(width)](tokens)


class Prompts(nn.Module):
    """p learned tokens of a stream, (1, p, C), or (B, p, C) where dropout draws a mask per sample.

    Called with a stream they are returned, to become keys and values; called with a stream and its layout they are
    put into the stream after its prefix tokens, and live on through the blocks.

    embedding: (num_tokens, dim), uniform in (-bound, bound). copies: each token so many times (shared="intra").
    project: what makes tokens of the stream's width of them, shared by all prompts of an adapter. trained: False makes
    the embedding a buffer. source: (tower, "inputs" or "outputs", block) of the class prototypes that they start from;
    until those are known the embedding is NaN, and using it an error.
    """

    pointwise = True
    constant = True

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        bound: float,
        dropout: float = 0.0,
        *,
        copies: int = 1,
        project: Projection | None = None,
        trained: bool = True,
        source: tuple[int, str, int] | None = None,
    ):
        super().__init__()
        embedding = torch.empty(num_tokens, dim).uniform_(-bound, bound)
        hold(self, "embedding", embedding if source is None else torch.full_like(embedding, torch.nan), trained)
        self.source, self.ready = source, source is None
        self.project = project
        self.copies = copies
        self.dropout = nn.Dropout(dropout)

    def train(self, mode: bool = True) -> Prompts:
        self.look()
        return super().train(mode)

    def look(self) -> bool:
        """Whether the prompts have a start; it may have come from a file in the meantime."""
        if not self.ready and not self.embedding.is_meta:
            self.ready = not bool(self.embedding.isnan().any())
        return self.ready

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, ..., C): only its width and, while dropout is active, its batch size are read."""
        if not self.ready and not self.look():
            raise RuntimeError(
                "these prompts start from class prototypes, which have not been computed yet: call "
                "deltalens.prepare(model, loader) with the training data once before training (deltalens.training.fit "
                "does it by itself)"
            )
        tokens = self.embedding.unsqueeze(0)
        if self.project is not None:
            tokens = self.project(tokens, x.shape[-1])
        if self.copies > 1:
            tokens = tokens.repeat_interleave(self.copies, 1)
        if self.training and self.dropout.p:
            tokens = self.dropout(tokens.expand(x.shape[0], -1, -1))
        return tokens

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return self.tokens(x) if layout is None else layout.insert(x, self.tokens(x))


class AddedToken(Prompts):
    """One learned vector added to every token of the stream, (1, C)."""

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return x + self.tokens(x).to(x.dtype)


class AddedTokens(Prompts):
    """A learned vector for each of the stream's own tokens, prefix first, added: (prefix + H * W, C).

    On a map of another size the map's part is resized bilinearly. Tokens that other adapters added are left alone.
    """

    def __init__(self, prefix: int, grid: tuple[int, int], dim: int, bound: float, dropout: float = 0.0, **options):
        super().__init__(prefix + grid[0] * grid[1], dim, bound, dropout, **options)
        self.prefix, self.grid = prefix, grid

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        feature_map, before = layout.split(x)
        tokens = self.tokens(x).to(x.dtype)
        of_map = tokens[:, self.prefix :].unflatten(1, self.grid)
        if feature_map.shape[1:3] != self.grid:
            of_map = F.interpolate(of_map.permute(0, 3, 1, 2), feature_map.shape[1:3], mode="bilinear")
            of_map = of_map.permute(0, 2, 3, 1)
        if before is not None:
            own, others = before[:, : self.prefix], before[:, self.prefix :]
            before = torch.cat([own + tokens[:, : self.prefix], others], 1)
        return layout.join(feature_map + of_map, before)


class PrefixKeysValues(nn.Module):
    """p learned keys and p learned values of one attention, each (heads, p, head_dim): no norm, no projection.

    dropout: a mask per sample and block, on keys and values. copies: each pair so many times (shared="intra").
    """

    pointwise = True
    constant = True

    def __init__(
        self,
        shape: tuple[int, int, int],
        bound: float,
        dropout: float = 0.0,
        *,
        copies: int = 1,
        trained: bool = True,
    ):
        super().__init__()
        hold(self, "keys", torch.empty(shape).uniform_(-bound, bound), trained)
        hold(self, "values", torch.empty(shape).uniform_(-bound, bound), trained)
        self.copies = copies
        self.dropout = nn.Dropout(dropout)

    def _of(self, tensor: Tensor, x: Tensor) -> Tensor:
        tensor = tensor.unsqueeze(0)
        if self.copies > 1:
            tensor = tensor.repeat_interleave(self.copies, 2)
        if self.training and self.dropout.p:
            tensor = self.dropout(tensor.expand(x.shape[0], -1, -1, -1))
        return tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._of(self.keys, x), self._of(self.values, x)
