"""timm's VisionTransformer: blocks with a class token, registers or neither, LayerScale, qk-norm, gates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from deltalens.backbones.pixels import STEM, through_images
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.output import live, pooled, through_output
from deltalens.sites.swap import Swapped, original_class, original_method
from deltalens.sites.weights import linear_rows


# ------------------------------------------------------------------ attention with prompts as extra keys and values
def _heads(attn: Attention, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, N, count * heads * head_dim) -> `count` tensors (B, heads, N, head_dim)."""
    return x.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def prompt_keys_values(block: Block, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    attn, width = block.attn, block.attn.num_heads * block.attn.head_dim
    k, v = _heads(attn, linear_rows(attn.qkv, block.norm1(prompts), width, 3 * width), 2)
    return attn.k_norm(k), v


def _attend(
    block: Block, x: Tensor, keys_values: list, attn_mask: Tensor | None, is_causal: bool, keep: int | None
) -> Tensor:
    """timm's Attention.forward with further keys and values, for all queries or the first `keep` ones."""
    attn, width, length = block.attn, block.attn.num_heads * block.attn.head_dim, x.shape[1]
    if keep is None:
        q, k, v = _heads(attn, attn.qkv(x), 3)
        q, queried = q.clone() if keys_values else q, x  # else backward would keep all of qkv beside the longer k and v
    else:
        queried = x[:, :keep]
        (q,) = _heads(attn, linear_rows(attn.qkv, queried, 0, width), 1)
        k, v = _heads(attn, linear_rows(attn.qkv, x, width, 3 * width), 2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    for extra_k, extra_v in keys_values:
        k = torch.cat([extra_k.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([extra_v.to(v.dtype).expand(v.shape[0], -1, -1, -1), v], 2)
    if is_causal:
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if attn_mask is None or attn_mask.dtype == torch.bool:
            attn_mask = causal if attn_mask is None else causal & attn_mask
        else:
            attn_mask = attn_mask.masked_fill(~causal, float("-inf"))
    if attn_mask is not None and keys_values:
        visible = True if attn_mask.dtype == torch.bool else 0.0
        attn_mask = F.pad(attn_mask, (k.shape[2] - length, 0), value=visible)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attention(q, k, v, attn_mask, dropout, attn.fused_attn)
    y = attn.norm(y.transpose(1, 2).flatten(2)) if hasattr(attn, "norm") else y.transpose(1, 2).flatten(2)
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(queried).sigmoid()
    return attn.proj_drop(attn.proj(y))


def _block_forward(
    self: Block, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, keep: int | None = None
) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        mask = slots.mask(attn_mask, normed, slots.layout)
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        if prompts or keep is not None or (is_causal and mask is not None):
            keys_values = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
            return self.ls1(_attend(self, normed, keys_values, mask, is_causal, keep))
        masks = {} if mask is None else {"attn_mask": mask}
        return self.ls1(self.attn(normed, **masks, **({"is_causal": True} if is_causal else {})))

    def mlp(normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed))

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path1),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    x = residual_block(slots, slots.layout, x, branches, keep)
    leaves = slots.last and keep is None and not slots.live("tokens.kept")
    return slots.layout.trim(x) if leaves else x


def _width(block: Block) -> int:
    return block.mlp.fc1.in_features if hasattr(block.mlp, "fc1") else block.attn.qkv.in_features


def _parts(block: Block) -> dict[str, Part]:
    width = block.attn.num_heads * block.attn.head_dim
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    parts["proj"] = Part("attn.proj")
    return parts | {name: Part(f"mlp.{name}") for name in ("fc1", "fc2") if hasattr(block.mlp, name)}


BLOCK = Family(
    name="deltalens.backbones.timm.vit:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": ("attn.qkv", "attn.gate"), "mlp.pre": ("mlp.fc1",)},
)


# ------------------------------------------------------------------ the patch embedding and the owner of the tokens
def _embed_forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """The image as adapters change it; its grid is recorded."""
    x = through_images(self, x)
    height, width = self.dynamic_feat_size(x.shape[-2:])
    self.__dict__["delta_layout"].record(height, width)
    return original_method(self, "forward")(x, *args, **kwargs)


EMBED = Family(name="deltalens.backbones.timm.vit:EMBED", methods={"forward": _embed_forward})
IMAGE = Family(
    name="deltalens.backbones.timm.vit:IMAGE", methods={"forward": _embed_forward}, slots=frozenset({"image"})
)  # the same reading: either may be put on top of the other


def _head_reads_class_row_only(model: VisionTransformer) -> bool:
    """Whether nothing but the class token's row of the last block reaches the output of `forward`."""
    cls, last = original_class(model), model.blocks[-1] if len(model.blocks) else None
    return (
        isinstance(last, Swapped)
        and BLOCK in type(last)._families
        and model.global_pool == "token"
        and model.attn_pool is None
        and model.cls_token is not None
        and not live(model, "pool")
        and cls.forward is VisionTransformer.forward
        and cls.forward_features is VisionTransformer.forward_features
        and cls.forward_head is VisionTransformer.forward_head
        and cls.pool is VisionTransformer.pool
        and all(
            getattr(module, "pointwise", False)
            for slot in last.delta._modules
            if slot not in ("attention_prompts", "tokens_in")
            for module in last.delta.live(slot)
        )
    )


def _owner_forward(self: VisionTransformer, x: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
    masks = {} if attn_mask is None else {"attn_mask": attn_mask}
    if masks or kwargs or not _head_reads_class_row_only(self):
        if not live(self, "output"):
            return original_method(self, "forward")(x, **masks, **kwargs)
        features = self.forward_head(self.forward_features(x, **masks, **kwargs), pre_logits=True)
        return through_output(self, features, x)
    images = x
    x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
    for block in self.blocks[:-1]:
        x = checkpoint(block, x) if self.grad_checkpointing else block(x)
    last = self.blocks[-1]
    x = checkpoint(last, x, keep=1) if self.grad_checkpointing else last(x, keep=1)
    x = self.norm(x)
    if not live(self, "output"):
        return self.forward_head(x)
    return through_output(self, self.forward_head(x, pre_logits=True), images)


def _pool(self: VisionTransformer, x: Tensor, pool_type: str | None = None) -> Tensor:
    features = pooled(self, x, self.__dict__["delta_layout"]) if pool_type is None else None
    return original_method(self, "pool")(x, pool_type) if features is None else features


def _forward_intermediates(
    self: VisionTransformer,
    x: Tensor,
    indices=None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    **kwargs,
):
    """timm's method; tokens that adapters added to the stream never leave it."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    result = original_method(self, "forward_intermediates")(
        x, indices, True, norm, stop_early, "NLC", intermediates_only, **kwargs
    )
    layout = self.__dict__["delta_layout"]
    final, taken = (None, result) if intermediates_only else result
    maps, prefixes = [], []
    for item in taken:
        tokens, prefix = item if isinstance(item, tuple) else (item, None)
        feature_map, _ = layout.split(tokens)
        maps.append(feature_map.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature_map.flatten(1, 2))
        prefixes.append(prefix)
    with_prefix = return_prefix_tokens and bool(self.num_prefix_tokens)
    final = None if intermediates_only else layout.trim(final)
    if output_dict:
        found = {"image_intermediates": maps}
        if with_prefix:
            found["image_intermediates_prefix"] = prefixes
        return found if intermediates_only else {**found, "image_features": final}
    taken = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
    return taken if intermediates_only else (final, taken)


OWNER = Family(
    name="deltalens.backbones.timm.vit:OWNER",
    methods={"forward": _owner_forward, "pool": _pool, "forward_intermediates": _forward_intermediates},
    slots=frozenset({"pool", "output"}),
)


def _family(block: nn.Module) -> Family:
    known = original_class(block).forward is Block.forward and original_class(block.attn).forward is Attention.forward
    return BLOCK if known else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every VisionTransformer in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, VisionTransformer) or not len(owner.blocks):
            continue
        embed, width = owner.patch_embed, owner.embed_dim
        tower = Tower("vision", Tokens(owner.num_prefix_tokens), class_token=owner.cls_token is not None)
        for i, block in enumerate(owner.blocks):
            tower.add(f"blocks.{i}", block, _family(block), width, getattr(embed, "grid_size", None))
        tower.patch_size, tower.image_size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
        tower.resizable = "dynamic_img_size=True" if getattr(embed, "strict_img_size", False) else ""
        tower.embed = Site("patch_embed", embed, EMBED, width, tower=tower)
        tower.image = Site("patch_embed", embed, IMAGE, width, tower=tower)
        if isinstance(getattr(embed, "proj", None), nn.Conv2d):
            tower.stem = Site("patch_embed.proj", embed.proj, STEM, width, tower=tower)
        if original_class(owner).forward_intermediates is VisionTransformer.forward_intermediates:
            tower.owner = tower.classifier = Site("", owner, OWNER, owner.embed_dim, tower=tower)
        yield path, tower
