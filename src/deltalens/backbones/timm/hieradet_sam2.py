"""timm's HieraDet, the image encoder of SAM 2: Hiera's blocks on maps (B, H, W, C), in windows that are padded.

Slots are those of `hiera`: a block whose width changes projects and pools x on the way of the shortcut, and offers no
`attention.parallel` and no `block.parallel`. Prompts are keys and values of every window. Padding lies behind
`attention.pre`, so that merging leaves its modules in place in windowed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock, window_partition
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.timm.hiera import EXPANDING_SLOTS, SLOTS, expanding_block, input_widths
from deltalens.backbones.timm.windows import per_window
from deltalens.backbones.unknown import UNKNOWN_BLOCK, input_size
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.layout import ChannelsLast
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows


def prompt_keys_values(block: MultiScaleBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, width of the input) -> keys and values, each (1 or B, heads, p, head_dim)."""
    kv = linear_rows(block.attn.qkv, block.norm1(prompts), block.dim_out, 3 * block.dim_out)
    return kv.unflatten(-1, (2, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attn: MultiScaleAttention, x: Tensor, keys_values: list) -> Tensor:
    """timm's MultiScaleAttention.forward on windows (B, h, w, C) with further keys and values."""
    height, width = x.shape[1:3]
    q, k, v = attn.qkv(x).unflatten(-1, (3, -1)).unbind(3)
    if attn.q_pool is not None:
        q = attn.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        height, width = q.shape[1:3]
    q, k, v = (part.flatten(1, 2).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    q = q.clone()  # else backward would keep all of qkv beside the longer k and v
    for extra_k, extra_v in keys_values:
        k = torch.cat([per_window(extra_k.to(k.dtype), len(k)), k], 2)
        v = torch.cat([per_window(extra_v.to(v.dtype), len(v)), v], 2)
    y = attention(q, k, v, None, 0.0, attn.fused_attn)
    return attn.proj(y.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


def _in_windows(block: MultiScaleBlock, x: Tensor, keys_values: list) -> Tensor:
    """Pad, partition, attend, merge: (B, H, W, C) -> the same, pooled where the block pools."""

    def attend(windows: Tensor) -> Tensor:
        return _attend(block.attn, windows, keys_values) if keys_values else block.attn(windows)

    if not block.is_windowed:
        return attend(x)
    height, width = x.shape[1:3]
    size, stride = block.window_size, block.q_stride or (1, 1)
    x = F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    rows, columns = x.shape[1] // size[0], x.shape[2] // size[1]
    y = attend(window_partition(x, size)).unflatten(0, (-1, rows, columns))  # (B, rows, columns, h, w, C)
    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return y[:, : height // stride[0], : width // stride[1]].contiguous()


def _shortcut(block: MultiScaleBlock, normed: Tensor) -> Tensor:
    x = block.proj(normed)
    return x if block.pool is None else block.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _block_forward(self: MultiScaleBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        pairs = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
        return self.ls1(_in_windows(self, normed, pairs))

    def mlp(normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed))

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path1),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    if self.dim != self.dim_out:
        return expanding_block(slots, x, *branches, lambda x, normed: _shortcut(self, normed))
    return residual_block(slots, slots.layout, x, branches)


def _parts(block: MultiScaleBlock) -> dict[str, Part]:
    width = block.dim_out
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    parts |= {"proj": Part("attn.proj"), "fc1": Part("mlp.fc1"), "fc2": Part("mlp.fc2")}
    return parts | {"expand": Part("proj")} if isinstance(block.proj, nn.Linear) else parts


def _readers(block: MultiScaleBlock) -> dict[str, tuple[str, ...]]:
    return {"mlp.pre": ("mlp.fc1",)} | ({} if block.is_windowed else {"attention.pre": ("attn.qkv",)})


_COMMON = {
    "methods": {"forward": _block_forward},
    "parts": _parts,
    "width": lambda block: block.dim_out,
    "keys_values": prompt_keys_values,
    "readers": _readers,
}
BLOCK = Family(name="deltalens.backbones.timm.hieradet_sam2:BLOCK", slots=SLOTS, **_COMMON)
POOLING_BLOCK = Family(
    name="deltalens.backbones.timm.hieradet_sam2:POOLING_BLOCK",
    slots=EXPANDING_SLOTS,
    widths=input_widths,
    **_COMMON,
)


def _family(block: MultiScaleBlock) -> Family:
    known = original_class(block).forward is MultiScaleBlock.forward
    if not known or original_class(block.attn).forward is not MultiScaleAttention.forward:
        return UNKNOWN_BLOCK
    return POOLING_BLOCK if block.dim != block.dim_out else BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the network, tower) for every HieraDet in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, HieraDet) or not len(owner.blocks):
            continue
        tower, conv = Tower("vision", ChannelsLast()), owner.patch_embed.proj
        for i, block in enumerate(owner.blocks):
            tower.add(f"blocks.{i}", block, _family(block), block.dim_out)
        width = conv.out_channels
        tower.image = Site("patch_embed", owner.patch_embed, IMAGE, width, tower=tower)
        tower.stem = Site("patch_embed.proj", conv, STEM, width, tower=tower)
        tower.patch_size, tower.image_size = tuple(conv.stride), input_size(model)[1:]
        tower.resizable = "position embeddings that fit any size, which HieraDet does not have"
        yield path, tower
