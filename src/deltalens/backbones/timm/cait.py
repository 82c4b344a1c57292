"""timm's CaiT: talking-heads attention on patch tokens; the class token joins behind them (see `class_attention`).

Attention mixes its heads before and after the softmax, for every pair of query and key. Prompts as keys and values take
part in that; the softmax runs over them and the patches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from torch import Tensor, nn

from deltalens.backbones.pixels import STEM
from deltalens.backbones.timm.class_attention import OWNER
from deltalens.backbones.timm.token_owner import EMBED, IMAGE
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows


def _heads(attn: TalkingHeadAttn, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, N, count * C) -> `count` tensors (B, heads, N, head_dim)."""
    return x.unflatten(-1, (count, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def prompt_keys_values(block: LayerScaleBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    width = block.attn.qkv.out_features // 3
    return _heads(block.attn, linear_rows(block.attn.qkv, block.norm1(prompts), width, 3 * width), 2)


def _mixed(layer: nn.Linear, scores: Tensor) -> Tensor:
    """A linear layer across the heads of (B, heads, queries, keys)."""
    return layer(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _attend(attn: TalkingHeadAttn, x: Tensor, keys_values: list) -> Tensor:
    """timm's TalkingHeadAttn.forward with further keys and values."""
    q, k, v = _heads(attn, attn.qkv(x), 3)
    for extra_k, extra_v in keys_values:
        k = torch.cat([extra_k.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([extra_v.to(v.dtype).expand(v.shape[0], -1, -1, -1), v], 2)
    scores = _mixed(attn.proj_l, (q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)
    y = attn.attn_drop(_mixed(attn.proj_w, scores)) @ v
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _block_forward(self: LayerScaleBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        pairs = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
        return self.gamma_1 * (_attend(self.attn, normed, pairs) if pairs else self.attn(normed))

    def mlp(normed: Tensor) -> Tensor:
        return self.gamma_2 * self.mlp(normed)

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path),
        Branch("mlp", self.norm2, mlp, self.drop_path),
    )
    x = residual_block(slots, slots.layout, x, branches)
    return slots.layout.trim(x) if slots.last else x


def _parts(block: LayerScaleBlock) -> dict[str, Part]:
    width = block.attn.qkv.out_features // 3
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    parts["proj"] = Part("attn.proj")
    return parts | {name: Part(f"mlp.{name}") for name in ("fc1", "fc2") if hasattr(block.mlp, name)}


BLOCK = Family(
    name="deltalens.backbones.timm.cait:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=_parts,
    width=lambda block: block.attn.qkv.in_features,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": ("attn.qkv",), "mlp.pre": ("mlp.fc1",)},
)


def _family(block: nn.Module) -> Family:
    known = original_class(block).forward is LayerScaleBlock.forward
    return BLOCK if known and original_class(block.attn).forward is TalkingHeadAttn.forward else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the network, tower) for every Cait in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, Cait) or not len(owner.blocks):
            continue
        embed, width = owner.patch_embed, owner.embed_dim
        tower = Tower("vision", Tokens(0))
        for i, block in enumerate(owner.blocks):
            tower.add(f"blocks.{i}", block, _family(block), width, embed.grid_size)
        tower.patch_size, tower.image_size = embed.patch_size, embed.img_size
        tower.resizable = "position embeddings for other sizes, which Cait does not have"
        tower.embed = Site("patch_embed", embed, EMBED, width, tower=tower)
        tower.image = Site("patch_embed", embed, IMAGE, width, tower=tower)
        tower.stem = Site("patch_embed.proj", embed.proj, STEM, width, tower=tower)
        tower.owner = Site("", owner, OWNER, width, tower=tower)
        yield path, tower
