"""timm's other Swin v2 (`swinv2_cr_*`): post-norm blocks as in `swin_v2`, a bias without bounds, norms on the stream.

    x <- x + norm1(attn(x));  x <- norm3(x + norm2(mlp(x)))

norm3 is there in some blocks only (the last of a stage, or every sixth); all slots of the block lie before it. The
network hands maps (B, C, H, W) from stage to stage, with carried prompts beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from timm.models.swin_transformer_v2_cr import (
    PatchEmbed,
    PatchMerging,
    SwinTransformerV2Cr,
    SwinTransformerV2CrBlock,
    SwinTransformerV2CrStage,
    WindowMultiHeadAttention,
)
from torch import Tensor, nn

from deltalens.backbones.timm.swin_v2 import cosine_attention
from deltalens.backbones.timm.windows import (
    MapAndPrompts,
    add_pixels,
    block_forward,
    in_windows,
    map_of,
    merging_forward,
    parts,
    post_norm_branches,
    prompt_pairs,
    readers,
)
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS
from deltalens.sites.layout import ChannelsLast, Tokens
from deltalens.sites.output import live, pooled, through_output
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import linear_rows


def prompt_keys_values(block: SwinTransformerV2CrBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (1 or B, p, C) -> keys of unit length and values, each (1 or B, heads, p, head_dim)."""
    attn = block.attn
    kv = linear_rows(attn.qkv, prompts, block.dim, 3 * block.dim)
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.normalize(k, dim=-1), v


def _block_forward(self: SwinTransformerV2CrBlock, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    def attend(read: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        extra = prompt_pairs(self, read, prompt_keys_values)
        if not extra and carried is None:
            return self._shifted_window_attn(read), None

        def in_window(tokens: Tensor, mask: Tensor | None, prompt_queries: int) -> Tensor:
            bias = self.attn._relative_positional_encodings()
            return cosine_attention(self.attn, self.attn.qkv(tokens), bias, mask, prompt_queries, extra)

        return in_windows(self, read, carried, in_window)

    x = block_forward(self, x, functools.partial(post_norm_branches, self), attend)
    return (self.norm3(x[0]), self.norm3(x[1])) if isinstance(x, tuple) else self.norm3(x)


BLOCK = Family(
    name="deltalens.backbones.timm.swin_v2_cr:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=parts,
    width=lambda block: block.dim,
    keys_values=prompt_keys_values,
    readers=lambda block: readers(block, block.feat_size),
)


# ------------------------------------------------------------------ carriers of prompts between blocks
def _with_map(x: Tensor | MapAndPrompts, *axes: int) -> Tensor | MapAndPrompts:
    """The stream with the axes of its map permuted."""
    return (x[0].permute(axes), x[1]) if isinstance(x, tuple) else x.permute(axes)


def _stage_forward(self: SwinTransformerV2CrStage, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    x = self.downsample(_with_map(x, 0, 2, 3, 1))
    for block in self.blocks:
        x = checkpoint(block, x) if self.grad_checkpointing else block(x)
    return _with_map(x, 0, 3, 1, 2)


def _forward(self: SwinTransformerV2Cr, x: Tensor) -> Tensor:
    """The head pools map and prompts together, as published for Swin, unless a `pool` module says otherwise."""
    images, x = x, self.stages(self.patch_embed(x))
    if isinstance(x, tuple) or live(self, "pool"):
        feature_map = map_of(x)
        tokens = feature_map.flatten(2).transpose(1, 2)
        tokens = torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens
        features = pooled(self, tokens, Tokens(prefix=0, grid=feature_map.shape[2:]))
        x = (tokens if features is None else features[:, None]).transpose(1, 2).unsqueeze(2)
    if not live(self, "output"):
        return self.forward_head(x)
    return through_output(self, self.forward_head(x, pre_logits=True), images)


def _forward_features(self: SwinTransformerV2Cr, x: Tensor) -> Tensor:
    return map_of(self.stages(self.patch_embed(x)))


def _forward_intermediates(self: SwinTransformerV2Cr, x: Tensor, *args, **kwargs):
    """timm's method, without the prompts."""
    result = original_method(self, "forward_intermediates")(x, *args, **kwargs)
    if isinstance(result, tuple):
        return map_of(result[0]), [map_of(tap) for tap in result[1]]
    return [map_of(tap) for tap in result]


MERGING = Family(name="deltalens.backbones.timm.swin_v2_cr:MERGING", methods={"forward": merging_forward})
STAGE = Family(name="deltalens.backbones.timm.swin_v2_cr:STAGE", methods={"forward": _stage_forward})
OWNER = Family(
    name="deltalens.backbones.timm.swin_v2_cr:OWNER",
    methods={
        "forward": _forward,
        "forward_features": _forward_features,
        "forward_intermediates": _forward_intermediates,
    },
    slots=frozenset({"pool", "output"}),
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all blocks of this kind in the tree, none where one of them has a forward of its own: it could not
    take prompts that others carry."""
    tower = Tower("vision", ChannelsLast())
    for path, module in model.named_modules():
        if isinstance(module, SwinTransformerV2CrBlock):
            known = original_class(module).forward is SwinTransformerV2CrBlock.forward
            if not known or original_class(module.attn).forward is not WindowMultiHeadAttention.forward:
                return
            tower.add(path, module, BLOCK, module.dim, tuple(module.feat_size))
        elif isinstance(module, PatchMerging):
            width = module.reduction.in_features // 4
            tower.carriers.append(Site(path, module, MERGING, width, tower=tower))
        elif isinstance(module, SwinTransformerV2CrStage):
            tower.carriers.append(Site(path, module, STAGE, module.blocks[0].dim, tower=tower))
        elif isinstance(module, SwinTransformerV2Cr):
            tower.classifier = Site(path, module, OWNER, module.num_features, tower=tower)
            tower.carriers.append(tower.classifier)
        elif isinstance(module, PatchEmbed) and tower.image is None:
            add_pixels(tower, path, module)
    if tower.blocks:
        yield "", tower
