"""Point-MAE's masked autoencoder, which pretrains a `PointTransformer` (Pang et al., ECCV 2022, arXiv 2203.06604)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from deltalens.models.point_ops import chamfer_distance, take_points
from deltalens.models.point_transformer import PointBlocks, PointTransformer, init_weights, rising_rates


class MaskedDecoder(PointBlocks):
    """Blocks on visible and masked tokens; the masked ones come out, normed."""

    def __init__(self, dim: int, blocks: Iterable[nn.Module]):
        super().__init__(blocks)
        self.norm = nn.LayerNorm(dim)

    def masked(self, x: Tensor, pos: Tensor, count: int) -> Tensor:
        """x, pos (B, N, C), the masked tokens last -> (B, count, C)."""
        return self.norm(self(x, pos)[:, -count:])


class PointMAE(nn.Module):
    """Rebuild masked patches of a cloud from the visible ones: `model(clouds (B, N, 3))` -> the loss.

    A share `mask_ratio` of the G patches, drawn at random, is hidden. The encoder reads the others; the decoder reads
    its output, a learned mask token for each hidden patch, and the positions of all. A convolution turns each hidden
    token into the k points of its patch, relative to its centre. The loss is the Chamfer distance L2 to the true ones.
    The official code passes hidden patches through the mini-PointNet too, where they move nothing but BatchNorm's
    statistics; here the visible ones alone do.

    The encoder is a `PointTransformer` without head and, as published, without class token: class_tokens=("cls",)
    adds one, so that it is pretrained too. The other options go to `PointTransformer`. Tensors are named as in the
    official checkpoint: `MAE_encoder.`, `MAE_decoder.`, `mask_token`, `decoder_pos_embed.`, `increase_dim.`; the
    published size has 29,006,432 parameters.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = 0.6,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        drop_path: float = 0.1,
        class_tokens: tuple[str, ...] = (),
        **options: Any,
    ):
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in (0, 1), got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.MAE_encoder = PointTransformer(0, drop_path=drop_path, class_tokens=class_tokens, **options)
        dim = self.MAE_encoder.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        rates = rising_rates(drop_path, decoder_depth)
        blocks = [Block(dim, decoder_heads, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates]
        self.MAE_decoder = MaskedDecoder(dim, blocks)
        self.increase_dim = nn.Sequential(nn.Conv1d(dim, 3 * self.MAE_encoder.group_size, 1))
        self.MAE_decoder.apply(init_weights)
        self.decoder_pos_embed.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def rebuild(self, groups: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and centres -> (hidden patches as rebuilt, as they are), each (B, hidden, k, 3)."""
        count = centres.shape[1]
        hidden = max(1, int(self.mask_ratio * count))
        order = torch.rand(centres.shape[:2], device=centres.device).argsort(1)
        visible, masked = order[:, : count - hidden], order[:, count - hidden :]
        tokens, pos = self.MAE_encoder.embed(
            take_points(groups.flatten(2), visible).unflatten(2, groups.shape[2:]), take_points(centres, visible)
        )
        tokens = self.MAE_encoder.encode(tokens, pos)[:, len(self.MAE_encoder.class_tokens) :]
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), hidden, -1)
        decoder_pos = self.decoder_pos_embed(take_points(centres, order))
        rebuilt = self.MAE_decoder.masked(torch.cat([tokens, mask_tokens], 1), decoder_pos, hidden)
        points = self.increase_dim(rebuilt.transpose(1, 2)).transpose(1, 2)
        return points.unflatten(2, (-1, 3)), take_points(groups.flatten(2), masked).unflatten(2, groups.shape[2:])

    def forward(self, clouds: Tensor) -> Tensor:
        rebuilt, wanted = self.rebuild(*self.MAE_encoder.group(clouds))
        return chamfer_distance(rebuilt.flatten(0, 1).float(), wanted.flatten(0, 1).float())
