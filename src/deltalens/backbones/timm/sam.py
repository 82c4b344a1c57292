"""timm's VisionTransformerSAM (SAM, ViTDet): maps (B, H, W, C), attention in windows or over the whole map.

Prompts are shared by all windows of an image; their decomposed position bias is zero and they are not rotated. Tokens
that live on between blocks have no place in a map: `tokens.in` and `tokens.out` are not offered. In blocks with windows
drop path acts on windows, as in timm, before `attention.inner`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.vision_transformer_sam import (
    Attention,
    Block,
    VisionTransformerSAM,
    get_decomposed_rel_pos_bias,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.timm import token_attention as token
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import ChannelsLast
from deltalens.sites.output import live
from deltalens.sites.swap import original_class, original_method


# ------------------------------------------------------------------ attention with prompts as further keys and values
def prompt_keys_values(block: Block, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    k, v = token.fused_rows(block.attn, block.norm1(prompts), 1, 3).unbind(0)
    return block.attn.k_norm(k), v


def _attend(attn: Attention, x: Tensor, keys_values: list[token.KeysValues], images: int) -> Tensor:
    """timm's forward with further keys and values. x: windows (images * windows, H, W, C), image by image."""
    count, height, width, _ = x.shape
    q, k, v = token.fused_rows(attn, x.flatten(1, 2), 0, 3).unbind(0)
    q, k, bias = attn.q_norm(q.clone()), attn.k_norm(k), None
    if attn.use_rel_pos:
        size = (height, width)
        bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), attn.rel_pos_h, attn.rel_pos_w, size, size)
        bias = bias.unflatten(0, (count, attn.num_heads))
    elif attn.rope is not None:
        rope = attn.rope.get_embed()
        q, k = apply_rot_embed_cat(q, rope).type_as(v), apply_rot_embed_cat(k, rope).type_as(v)
    for extra_k, extra_v in keys_values:
        k = torch.cat([_per_window(extra_k.to(k.dtype), images, count), k], 2)
        v = torch.cat([_per_window(extra_v.to(v.dtype), images, count), v], 2)
    if bias is not None:
        bias = F.pad(bias, (k.shape[2] - height * width, 0)).to(q.dtype)
    y = attention(q, k, v, bias, attn.attn_drop.p if attn.training else 0.0, attn.fused_attn)
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2))).unflatten(1, (height, width))


def _per_window(x: Tensor, images: int, windows: int) -> Tensor:
    """(1 or images, heads, p, d) -> (windows, heads, p, d)."""
    return x.expand(windows, -1, -1, -1) if x.shape[0] == 1 else x.repeat_interleave(windows // images, 0)


# ------------------------------------------------------------------ the block
def _block_forward(self: Block, x: Tensor) -> Tensor:
    slots, (images, height, width, _) = self.delta, x.shape

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        keys_values = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
        windows, padded = window_partition(normed, self.window_size) if self.window_size > 0 else (normed, None)
        update = _attend(self.attn, windows, keys_values, images) if keys_values else self.attn(windows)
        update = self.drop_path1(self.ls1(update))
        return update if padded is None else window_unpartition(update, self.window_size, (height, width), padded)

    def mlp(normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed.flatten(1, 2))).unflatten(1, (height, width))

    branches = (
        Branch("attention", self.norm1, attend, _itself),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    return residual_block(slots, slots.layout, x, branches)


def _itself(x: Tensor) -> Tensor:
    return x


def _parts(block: Block) -> dict[str, Part]:
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp)


def _readers(block: Block) -> dict[str, tuple[str, ...]]:
    """Windows may be padded with zeros, which qkv reads beside what comes out of `attention.pre`."""
    readers = {"mlp.pre": token.mlp_readers()}
    return readers if block.window_size > 0 else readers | {"attention.pre": ("attn.qkv",)}


BLOCK = Family(
    name="deltalens.backbones.timm.sam:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS - {"tokens.in", "tokens.out"} | {"attention.prompts"},
    parts=_parts,
    width=lambda block: block.attn.qkv.in_features,
    keys_values=prompt_keys_values,
    readers=_readers,
)


def _owner_forward(self: VisionTransformerSAM, x: Tensor) -> Tensor:
    if not live(self, "output"):
        return original_method(self, "forward")(x)
    features = self.forward_head(self.forward_features(x), pre_logits=True)
    for module in live(self, "output"):
        features = module(features, x)
    return self.head.fc(features)


_METHODS = ("forward", "forward_features", "forward_head")
OWNER = Family(
    name="deltalens.backbones.timm.sam:OWNER", methods={"forward": _owner_forward}, slots=frozenset({"output"})
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every VisionTransformerSAM in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, VisionTransformerSAM):
            continue
        embed, tower = owner.patch_embed, Tower("vision", ChannelsLast())
        for i, block in enumerate(owner.blocks):
            known = original_class(block).forward is Block.forward
            if known and original_class(block.attn).forward is Attention.forward:
                tower.add(f"blocks.{i}", block, BLOCK, owner.embed_dim, embed.grid_size)
        if not tower.blocks:
            continue
        tower.patch_size, tower.image_size = embed.patch_size, embed.img_size
        tower.resizable = "strict_img_size=False" if embed.strict_img_size else ""
        if owner.rope_global is not None:  # computed once, for one size
            tower.resizable = "another img_size"
        tower.image = Site("patch_embed", embed, IMAGE, owner.embed_dim, tower=tower)
        tower.stem = Site("patch_embed.proj", embed.proj, STEM, owner.embed_dim, tower=tower)
        own = all(getattr(original_class(owner), f) is getattr(VisionTransformerSAM, f) for f in _METHODS)
        if own and isinstance(getattr(owner.head, "fc", None), nn.Linear):
            tower.classifier = Site("", owner, OWNER, owner.head.fc.in_features, tower=tower)
        yield path, tower
