"""timm's Swin Transformer: pre-norm window attention. Prompts inside the windows and beside the map: see `windows`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from deltalens.backbones.timm.windows import (
    OWNER,
    MapAndPrompts,
    add_pixels,
    block_forward,
    in_windows,
    merging_forward,
    parts,
    per_window,
    prompt_pairs,
    readers,
)
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch
from deltalens.sites.layout import ChannelsLast
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows


def prompt_keys_values(block: SwinTransformerBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    attn = block.attn
    width = attn.qkv.out_features // 3
    kv = linear_rows(attn.qkv, block.norm1(prompts), width, 3 * width)
    return kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _bias(attn: WindowAttention, mask: Tensor | None, windows: int, prompts: int, prompt_queries: int) -> Tensor:
    """Relative-position bias plus shift mask, zero for prompts: (1 or windows, heads, queries, keys)."""
    bias = attn._get_rel_pos_bias()
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    return F.pad(bias, (prompts, 0, prompt_queries, 0))


def _attend(
    attn: WindowAttention, tokens: Tensor, mask: Tensor | None, prompt_queries: int, keys_values: list
) -> Tensor:
    """timm's WindowAttention.forward on (windows, p + area, C) with further keys and values."""
    windows, length = tokens.shape[:2]
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q = q.clone() if keys_values else q  # else backward would keep all of qkv beside the longer k and v
    for extra_k, extra_v in keys_values:
        k = torch.cat([per_window(extra_k.to(k.dtype), windows), k], 2)
        v = torch.cat([per_window(extra_v.to(v.dtype), windows), v], 2)
    prompts = k.shape[2] - length + prompt_queries
    bias = _bias(attn, mask, windows, prompts, prompt_queries).to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attention(q, k, v, bias, dropout, attn.fused_attn)
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _block_forward(self: SwinTransformerBlock, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    def attend(normed: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        extra = prompt_pairs(self, normed, prompt_keys_values)
        if not extra and carried is None:
            return self._attn(normed), None
        return in_windows(self, normed, carried, lambda *window: _attend(self.attn, *window, extra))

    def branches(attention_branch) -> tuple[Branch, Branch]:
        return (
            Branch("attention", self.norm1, attention_branch, self.drop_path1),
            Branch("mlp", self.norm2, self.mlp, self.drop_path2),
        )

    return block_forward(self, x, branches, attend)


BLOCK = Family(
    name="deltalens.backbones.timm.swin:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=parts,
    width=lambda block: block.dim,
    keys_values=prompt_keys_values,
    readers=lambda block: readers(block, block.input_resolution),
)


MERGING = Family(name="deltalens.backbones.timm.swin:MERGING", methods={"forward": merging_forward})


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all Swin blocks in the tree."""
    tower = Tower("vision", ChannelsLast())
    for path, module in model.named_modules():
        if isinstance(module, SwinTransformerBlock):
            cls = original_class(module)
            if cls.forward is SwinTransformerBlock.forward and type(module.attn).forward is WindowAttention.forward:
                tower.add(path, module, BLOCK, module.dim, tuple(module.input_resolution))
        elif isinstance(module, PatchMerging):
            tower.carriers.append(Site(path, module, MERGING, module.dim, tower=tower))
        elif isinstance(module, SwinTransformer):
            tower.classifier = Site(path, module, OWNER, module.num_features, tower=tower)
            tower.carriers.append(tower.classifier)
        elif isinstance(module, PatchEmbed) and tower.image is None:
            add_pixels(tower, path, module)
    if tower.blocks:
        yield "", tower
