"""Transformers on patches of point clouds: Point-MAE, Point-BERT, ACT and ReCon.

=====================================================================  ==========================
Pang et al., Masked Autoencoders for Point Cloud Self-supervised       ECCV 2022, arXiv 2203.06604
Learning (Point-MAE)
Yu et al., Point-BERT                                                  CVPR 2022, arXiv 2111.14819
Dong et al., Autoencoders as Cross-Modal Teachers (ACT)                ICLR 2023, arXiv 2212.08320
Qi et al., Contrast with Reconstruct (ReCon)                           ICML 2023, arXiv 2302.02318
=====================================================================  ==========================

Tensors are named as in the official checkpoints. Blocks are timm's `Block`, with which every method for a ViT works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from deltalens.models.point_blocks import TwoStreamBlock
from deltalens.models.point_ops import group_points

CLASS_TOKENS = ("cls",)
HEADS = ("mlp-bn", "mlp", "linear")


class MiniPointNet(nn.Module):
    """Patches (B, G, k, 3) -> one vector each, (B, G, width): a PointNet shared by all patches.

    Per point 3 -> 128 -> 256 with BatchNorm and ReLU; [max over the patch, own] (512) -> 512 -> width with BatchNorm
    and ReLU; max over the patch. hidden: the two widths, 128 and 256 in all published models.

    The layer on [max, own] multiplies a patch's maximum once instead of once for each of its points:
    W [m, o_i] + b = W_m m + (W_o o_i + b).
    """

    def __init__(self, width: int, hidden: tuple[int, int] = (128, 256)):
        super().__init__()
        self.width = width
        self.first_conv = _point_layers(3, *hidden)
        self.second_conv = _point_layers(2 * hidden[1], 2 * hidden[1], width)

    def forward(self, groups: Tensor) -> Tensor:
        own = self.first_conv(groups.flatten(0, 1).transpose(1, 2))
        layer, *others = self.second_conv
        mixed = _on_maximum_and_own(layer, own)
        for other in others:
            mixed = other(mixed)
        return mixed.amax(2).unflatten(0, groups.shape[:2])


def _on_maximum_and_own(layer: nn.Conv1d, own: Tensor) -> Tensor:
    """layer([max over the points, own]) of own (M, C, k)."""
    whole = own.amax(2, keepdim=True)
    if (
        type(layer) is not nn.Conv1d or layer._forward_hooks or layer._forward_pre_hooks
    ):  # an adapter or a hook is there
        return layer(torch.cat([whole.expand_as(own), own], 1))
    of_whole, of_own = layer.weight.chunk(2, 1)
    return F.conv1d(own, of_own, layer.bias) + F.conv1d(whole, of_whole)


def _point_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers that act on every point alone."""
    return nn.Sequential(nn.Conv1d(width, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, out, 1))


class PointBlocks(nn.Module):
    """The blocks, and the positions that they get."""

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, pos: Tensor, every_block: bool = True, prefix: int = 1) -> Tensor:
        """x (B, N, C), pos (B, N, C): added before every block, or once. Tokens that a block puts into the stream
        behind its `prefix` first ones have no position."""
        for number, block in enumerate(self.blocks):
            x = block(x + _for_length(pos, x.shape[1], prefix) if every_block or not number else x)
        return x


def _for_length(pos: Tensor, length: int, prefix: int) -> Tensor:
    added = length - pos.shape[1]
    if not added:
        return pos
    zeros = pos.new_zeros(pos.shape[0], added, pos.shape[2])
    return torch.cat([pos[:, :prefix], zeros, pos[:, prefix:]], 1)


class PointHead(nn.Sequential):
    """Features (B, in_features) -> logits (B, out_features), trained as a whole.

    kind: "mlp-bn", the head of Point-MAE, ACT and ReCon (Linear 256, BatchNorm, ReLU, Dropout .5, twice, Linear);
    "mlp", Point-BERT's (Linear 256, ReLU, Dropout .5, Linear); "linear", one layer. vectors: how many tokens lie side
    by side in the features.
    """

    def __init__(self, in_features: int, out_features: int, kind: str, vectors: int = 1):
        if kind not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {kind!r}")
        hidden, width = [], in_features
        for _ in range({"mlp-bn": 2, "mlp": 1, "linear": 0}[kind]):
            norm = [nn.BatchNorm1d(256)] if kind == "mlp-bn" else []
            hidden += [nn.Linear(width, 256), *norm, nn.ReLU(), nn.Dropout(0.5)]
            width = 256
        super().__init__(*hidden, nn.Linear(width, out_features))
        self.in_features, self.out_features, self.kind, self.vectors = in_features, out_features, kind, vectors

    def with_classes(self, num_classes: int) -> PointHead:
        """A fresh head of the same kind for so many classes."""
        like = self[-1].weight
        return PointHead(self.in_features, num_classes, self.kind, self.vectors).to(like.device, like.dtype)

    def with_vectors(self, vectors: int) -> PointHead:
        """A head of the same kind that reads so many tokens side by side: this one where it does, else a fresh one."""
        if vectors == self.vectors:
            return self
        like, width = self[-1].weight, self.in_features // self.vectors
        return PointHead(vectors * width, self.out_features, self.kind, vectors).to(like.device, like.dtype)


class PointTransformer(nn.Module):
    """A classifier of point clouds: `model(clouds (B, N, 3))` -> logits (B, num_classes).

        t = MiniPointNet(patches)                            G patches of k nearest points around farthest points
        p = MLP(centres)                                     Linear 3 -> 128, GELU, Linear 128 -> dim
        x = [class tokens, t];  p = [their positions, p]
        x <- Block(x + p)                                    for every block: positions accumulate in the stream
        logits = head([class tokens of LN x, max over the patches of LN x])

    Pre-norm blocks with LayerNorm eps 1e-5, MLP ratio 4, qkv without bias. Point-MAE with 15 classes: 22,093,327
    parameters.

    dim, depth, heads, drop_path: of the blocks. num_groups, group_size: G and k. encoder_dim: width of the
    mini-PointNet; where it is not dim, a linear layer `reduce_dim` follows (Point-BERT: 256). encoder_hidden: its inner
    widths. class_tokens: names of the learned tokens in front, each with a position; "cls", and in ReCon "img" and
    "text" too. two_streams: ReCon's blocks, whose class tokens read the patches by cross-attention and are not read by
    them. head: see `PointHead`. pos_every_block: False adds positions once, before the first block, as DAPT does.
    skip_origin: see `farthest_points`; True in all official models. num_points: how many points the clouds should
    have; others work.

    num_classes=0: no head, the features (B, (class tokens + 1) dim) come out.
    """

    def __init__(
        self,
        num_classes: int = 15,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        num_groups: int = 128,
        group_size: int = 32,
        encoder_dim: int = 384,
        encoder_hidden: tuple[int, int] = (128, 256),
        drop_path: float = 0.1,
        head: str = "mlp-bn",
        class_tokens: tuple[str, ...] = CLASS_TOKENS,
        two_streams: bool = False,
        pos_every_block: bool = True,
        skip_origin: bool = True,
        num_points: int = 2048,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.dim, self.num_groups, self.group_size = dim, num_groups, group_size
        self.pos_every_block, self.skip_origin, self.num_points = pos_every_block, skip_origin, num_points
        self.untrained: tuple[str, ...] = ()  # class tokens that the loaded weights do not have
        self.class_tokens, self.head_kind = tuple(class_tokens), head
        self.encoder = MiniPointNet(encoder_dim, encoder_hidden)
        self.reduce_dim = nn.Linear(encoder_dim, dim) if encoder_dim != dim else nn.Identity()
        for name in self.class_tokens:
            self.register_parameter(f"{name}_token", nn.Parameter(torch.zeros(1, 1, dim)))
            self.register_parameter(f"{name}_pos", nn.Parameter(torch.zeros(1, 1, dim)))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
        rates = rising_rates(drop_path, depth)
        options: list[dict[str, Any]] = [{"dim": dim, "num_heads": heads, "drop_path": rate} for rate in rates]
        if two_streams:
            blocks: list[nn.Module] = [TwoStreamBlock(**each, prefix=len(self.class_tokens)) for each in options]
        else:
            blocks = [Block(**each, norm_layer=nn.LayerNorm) for each in options]
        self.blocks = PointBlocks(blocks)
        self.norm = nn.LayerNorm(dim)
        self.num_features = (len(self.class_tokens) + 1) * dim
        self.apply(init_weights)
        self.init_class_tokens()
        self.reset_classifier(num_classes)

    # ------------------------------------------------------------------ what a classifier offers
    def get_classifier(self) -> nn.Module:
        return self.cls_head_finetune

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for so many classes; 0 for none."""
        self.num_classes = num_classes
        vectors = len(self.class_tokens) + 1
        head = PointHead(self.num_features, num_classes, self.head_kind, vectors) if num_classes else nn.Identity()
        self.cls_head_finetune = head

    def init_class_tokens(self, names: tuple[str, ...] | None = None, seed: int | None = None) -> None:
        """Draw class tokens and their positions from a normal distribution with std .02, cut at 2. names: which
        parameters, all by default. seed: always the same numbers."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name in self.class_token_names() if names is None else names:
            drawn = torch.empty(1, 1, self.dim)
            nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
            with torch.no_grad():
                self.get_parameter(name).copy_(drawn)

    def class_token_names(self) -> tuple[str, ...]:
        """Parameters of the class tokens: each token, then its position."""
        return tuple(f"{name}_{kind}" for name in self.class_tokens for kind in ("token", "pos"))

    # ------------------------------------------------------------------ forward
    def group(self, clouds: Tensor) -> tuple[Tensor, Tensor]:
        """Clouds (B, N, 3) -> patches (B, G, k, 3) and centres (B, G, 3), in the type of the weights."""
        groups, centres = group_points(clouds, self.num_groups, self.group_size, self.skip_origin)
        like = self.norm.weight
        return groups.to(like.dtype), centres.to(like.dtype)

    def embed(self, groups: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and centres -> tokens (B, G, dim) and their positions (B, G, dim)."""
        return self.reduce_dim(self.encoder(groups)), self.pos_embed(centres)

    def encode(self, tokens: Tensor, pos: Tensor, every_block: bool | None = None) -> Tensor:
        """Tokens and positions of some patches -> normed stream (B, class tokens + patches, dim). every_block: whether
        positions are added before every block, None for what the model was built with."""
        every_block = self.pos_every_block if every_block is None else every_block
        batch = tokens.shape[0]
        names = self.class_tokens
        first = [self.get_parameter(f"{name}_token").expand(batch, -1, -1) for name in names]
        their_pos = [self.get_parameter(f"{name}_pos").expand(batch, -1, -1) for name in names]
        tokens, pos = torch.cat([*(t.to(tokens.dtype) for t in first), tokens], 1), torch.cat([*their_pos, pos], 1)
        return self.norm(self.blocks(tokens, pos, every_block, len(names)))

    def forward_features(self, clouds: Tensor) -> Tensor:
        """Clouds -> normed tokens (B, class tokens + G, dim)."""
        return self.encode(*self.embed(*self.group(clouds)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Class tokens and the maximum over the patches, side by side: (B, num_features)."""
        prefix = len(self.class_tokens)
        return torch.cat([tokens[:, :prefix].flatten(1), tokens[:, prefix:].amax(1)], 1)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.pool(tokens)
        return features if pre_logits else self.cls_head_finetune(features)

    def forward(self, clouds: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(clouds))


def rising_rates(last: float, depth: int) -> list[float]:
    """Rates of drop path, from 0 in the first block to `last` in the last one."""
    return [last * number / max(1, depth - 1) for number in range(depth)]


def init_weights(module: nn.Module) -> None:
    """Weights of linear layers and convolutions from a normal distribution with std .02, cut at 2; biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv1d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
