"""Point-PEFT's geometry-aware adapter: patches read their neighbours in space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.point_memory import QuickBottleneck
from deltalens.models.point_ops import farthest_points, nearest_points, take_points
from deltalens.sites.layout import Layout

NEAR = 1e-8  # added to squared distances before they are inverted


class LocalAttention(nn.Module):
    """x + proj(attention(qkv(LN x))), x (M, k, C): k tokens of one neighbourhood read each other. All blocks share it.

    Narrow: q, k and v have `inner` channels in all heads together, and scores are divided by sqrt(inner), as
    published, not by the root of a head's width. coordinates (p, 3): where the prompts are, learned, std .02.
    """

    def __init__(self, width: int, inner: int, heads: int, prompts: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        if prompts:
            self.coordinates = nn.Parameter(nn.init.trunc_normal_(torch.empty(prompts, 3), std=0.02))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.proj.in_features**-0.5)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


class GeometryAdapter(nn.Module):
    """`tokens.out`: what farthest patches find in their neighbourhoods is spread over all patches.

        S farthest of the G patches by their centres; k nearest tokens around each of them
        h = gelu( BN( max over the k of local(their tokens) )) + a * token of the centre        (B, S, C)
        x_i <- x_i + a * sum_j w_ij h_j,  w_ij ~ 1 / (|c_i - c_j|^2 + 1e-8), sum_j w_ij = 1     for every patch i
        x <- x + bottleneck(x)                                                                 all tokens

    prompts: how many tokens behind the prefix are prompts of this block. They are in space, too, at learned places, can
    be among the S and the k, and leave the stream here.
    """

    def __init__(
        self, width: int, local: LocalAttention, prompts: int, shape: tuple[int, int], bottleneck: int, **options: float
    ):
        super().__init__()
        self.local, self.norm = local, nn.BatchNorm1d(width)
        self.bottleneck = QuickBottleneck(width, bottleneck, options["dropout"])
        self.prompts, self.share = prompts, options["share"]
        self.centres, self.neighbours = shape

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        prefix, places = layout.prefix, layout.of_pass("centres").to(x.dtype)
        first = prefix + layout.added(x)
        patches, tokens = x[:, first:], x[:, first:]
        where = places
        if self.prompts:
            tokens = torch.cat([x[:, prefix : prefix + self.prompts], patches], 1)
            where = torch.cat([self.local.coordinates.to(places.dtype).expand(len(x), -1, -1), places], 1)
        x = torch.cat([x[:, :first], patches + self.share * self.spread(tokens, where, places)], 1)
        x = x + self.bottleneck(x)
        return torch.cat([x[:, :prefix], x[:, prefix + self.prompts :]], 1) if self.prompts else x

    def spread(self, tokens: Tensor, where: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, T, C) at `where` (B, T, 3) -> what reaches each of `places` (B, G, 3): (B, G, C)."""
        centres = farthest_points(where, self.centres)
        chosen = take_points(where, centres)
        near = take_points(tokens, nearest_points(where, chosen, self.neighbours))
        pooled = self.local(near.flatten(0, 1)).amax(1)
        pooled = F.gelu(self.norm(pooled)).view(len(tokens), -1, tokens.shape[-1])
        pooled = pooled + self.share * take_points(tokens, centres)
        with torch.autocast(tokens.device.type, enabled=False):
            exact = torch.promote_types(places.dtype, torch.float32)
            gaps = places.to(exact).unsqueeze(2) - chosen.to(exact).unsqueeze(1)
            weights = 1 / (gaps.square().sum(-1) + NEAR)
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(pooled.dtype) @ pooled
