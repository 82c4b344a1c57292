"""timm's Swin Transformer v2: norms behind the branches, cosine attention, continuous relative-position bias.

    x <- x + norm1(attn(x));  x <- x + norm2(mlp(x))

There is no norm(x) in front of a branch: n, what the frozen branch reads, is x itself, so `pre`, `parallel` and prompts
get the stream un-normed, and `inner` what comes out of the norm. q and k have unit length; prompts' keys are normalised
with them, keys given directly are not. The relative-position bias of prompts is zero. timm multiplies with qkv.weight
itself, to add the biases of q and v in the same product; here the layer is called where an adapter changes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from deltalens.backbones.timm.token_attention import (
    goes_around,
    own_bias_before_fold,
    own_bias_before_merge,
    spliced_bias,
)
from deltalens.backbones.timm.windows import (
    OWNER,
    MapAndPrompts,
    add_pixels,
    block_forward,
    in_windows,
    parts,
    per_window,
    post_norm_branches,
    prompt_pairs,
    readers,
)
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS
from deltalens.sites.layout import ChannelsLast
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import linear_rows

LARGEST_LOGIT_SCALE = math.log(100.0)


def _thirds(attn: WindowAttention, tokens: Tensor, first: int, last: int) -> Tensor:
    """Thirds first:last (q, k, v) of qkv's output, (windows, N, (last - first) C)."""
    return linear_rows(attn.qkv, tokens, first * attn.dim, last * attn.dim, spliced_bias(attn))


def prompt_keys_values(block: SwinTransformerV2Block, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (1 or B, p, C) -> keys of unit length and values, each (1 or B, heads, p, head_dim)."""
    heads = _thirds(block.attn, prompts, 1, 3).unflatten(-1, (2, block.attn.num_heads, -1))
    k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    return F.normalize(k, dim=-1), v


def _position_bias(attn: WindowAttention) -> Tensor:
    """16 sigmoid(cpb_mlp(relative coordinates)), (1, heads, area, area)."""
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    area = attn.window_size[0] * attn.window_size[1]
    bias = table[attn.relative_position_index.view(-1)].view(area, area, -1)
    return 16 * torch.sigmoid(bias.permute(2, 0, 1).contiguous()).unsqueeze(0)


def cosine_attention(
    attn: nn.Module, qkv: Tensor, bias: Tensor, mask: Tensor | None, prompt_queries: int, keys_values: list
) -> Tensor:
    """What follows the projection qkv (windows, p + area, 3 C) of tokens, with further keys and values.

    bias: of relative positions, (1, heads, area, area). Prompts have none, and no shift mask.
    """
    windows, length = qkv.shape[:2]
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    for extra_k, extra_v in keys_values:
        k = torch.cat([per_window(extra_k.to(k.dtype), windows), k], 2)
        v = torch.cat([per_window(extra_v.to(v.dtype), windows), v], 2)
    padding = (k.shape[2] - length + prompt_queries, 0, prompt_queries, 0)
    scale = attn.logit_scale.reshape(-1, 1, 1).clamp(max=LARGEST_LOGIT_SCALE).exp()
    scores = (q @ k.transpose(-2, -1)) * scale + F.pad(bias, padding)
    if mask is not None:
        mask = F.pad(mask, padding).unsqueeze(1).unsqueeze(0)
        scores = (scores.unflatten(0, (-1, mask.shape[1])) + mask).flatten(0, 1)
    y = attn.attn_drop(scores.softmax(-1)) @ v
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _attention_forward(self: WindowAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's own, unless a module changes the qkv layer that it goes around."""
    if not goes_around(self):
        return original_method(self, "forward")(x, mask)
    return cosine_attention(self, _thirds(self, x, 0, 3), _position_bias(self), mask, 0, [])


ATTENTION = Family(
    name="deltalens.backbones.timm.swin_v2:ATTENTION",
    methods={"forward": _attention_forward},
    before_merge=own_bias_before_merge,
)


def _block_forward(self: SwinTransformerV2Block, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    def attend(read: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        extra = prompt_pairs(self, read, prompt_keys_values)
        if not extra and carried is None:
            return self._attn(read), None

        def in_window(tokens: Tensor, mask: Tensor | None, prompt_queries: int) -> Tensor:
            qkv = _thirds(self.attn, tokens, 0, 3)
            return cosine_attention(self.attn, qkv, _position_bias(self.attn), mask, prompt_queries, extra)

        return in_windows(self, read, carried, in_window)

    return block_forward(self, x, functools.partial(post_norm_branches, self), attend)


BLOCK = Family(
    name="deltalens.backbones.timm.swin_v2:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=parts,
    width=lambda block: block.dim,
    keys_values=prompt_keys_values,
    readers=lambda block: readers(block, block.input_resolution),
    before_merge=own_bias_before_fold,
)


def _merging_forward(self: PatchMerging, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    """Prompts are tiled to 4 C channels, as published for Swin, and take this network's way from there."""
    merge = original_method(self, "forward")
    if not isinstance(x, tuple):
        return merge(x)
    feature_map, prompts = x
    return merge(feature_map), self.norm(self.reduction(prompts.repeat(1, 1, 4)))


MERGING = Family(name="deltalens.backbones.timm.swin_v2:MERGING", methods={"forward": _merging_forward})


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all Swin v2 blocks in the tree, none where one of them has a forward of its own: it could not take
    prompts that others carry."""
    tower = Tower("vision", ChannelsLast())
    for path, module in model.named_modules():
        if isinstance(module, SwinTransformerV2Block):
            known = original_class(module).forward is SwinTransformerV2Block.forward
            if not known or original_class(module.attn).forward is not WindowAttention.forward:
                return
            tower.add(path, module, BLOCK, module.dim, tuple(module.input_resolution))
            tower.callers.append(Site(f"{path}.attn", module.attn, ATTENTION, module.dim, tower=tower))
        elif isinstance(module, PatchMerging):
            tower.carriers.append(Site(path, module, MERGING, module.dim, tower=tower))
        elif isinstance(module, SwinTransformerV2):
            tower.classifier = Site(path, module, OWNER, module.num_features, tower=tower)
            tower.carriers.append(tower.classifier)
        elif isinstance(module, PatchEmbed) and tower.image is None:
            add_pixels(tower, path, module)
    if tower.blocks:
        yield "", tower
