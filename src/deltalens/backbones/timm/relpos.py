"""timm's VisionTransformerRelPos: relative position biases of each block or of all, pre-norm and post-norm.

`ResPostRelPosBlock` is x + norm(attn(x)): what its branches read, n, is x itself. The bias of prompts is zero, and so
is that of tokens that adapters put into the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.swap import original_class, original_method


# ------------------------------------------------------------------ attention
def _attend(
    attn: RelPosAttention, x: Tensor, keys_values: list[token.KeysValues], shared: Tensor | None, keep: int | None
) -> Tensor:
    """timm's forward with further keys and values, for all tokens or the first `keep` ones."""
    queried = x if keep is None else x[:, :keep]
    if keep is None:
        q, k, v = token.fused_rows(attn, x, 0, 3).unbind(0)
        q = q.clone() if keys_values else q
    else:
        (q,), (k, v) = token.fused_rows(attn, queried, 0, 1), token.fused_rows(attn, x, 1, 3)
    k, v = token.with_prompts(attn.k_norm(k), v, keys_values)
    bias = attn.rel_pos.get_bias() if attn.rel_pos is not None else shared
    if bias is not None:
        bias = token.widened(bias, attn.__dict__["delta_layout"].prefix, x.shape[1])[..., : queried.shape[1], :]
        bias = F.pad(bias, (k.shape[2] - x.shape[1], 0)).to(q.dtype)
    y = attention(attn.q_norm(q), k, v, bias, attn.attn_drop.p if attn.training else 0.0, attn.fused_attn)
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _attention_forward(self: RelPosAttention, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """timm's own, unless the stream has more tokens than the bias knows."""
    if self.rel_pos is not None:
        known = self.rel_pos.window_area + self.rel_pos.prefix_tokens
    else:
        known = x.shape[1] if shared_rel_pos is None else shared_rel_pos.shape[-1]
    if known == x.shape[1]:
        return original_method(self, "forward")(x, shared_rel_pos=shared_rel_pos)
    return _attend(self, x, [], shared_rel_pos, None)


ATTENTION = Family(name="deltalens.backbones.timm.relpos:ATTENTION", methods={"forward": _attention_forward})


# ------------------------------------------------------------------ blocks
def _itself(x: Tensor) -> Tensor:
    return x


def _attention_of(block: nn.Module, of_prompts: Callable, shared: Tensor | None, keep: int | None) -> Callable:
    """The block's attention with its slots, as a function of what it reads. of_prompts: gives their keys and values."""
    slots = block.delta

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        if prompts or keep is not None:
            keys_values = [p if isinstance(p, tuple) else of_prompts(block, p) for p in prompts]
            return _attend(block.attn, normed, keys_values, shared, keep)
        return block.attn(normed, shared_rel_pos=shared)

    return attend


def _block_forward(
    self: RelPosBlock, x: Tensor, shared_rel_pos: Tensor | None = None, keep: int | None = None
) -> Tensor:
    attend = _attention_of(self, prompt_keys_values, shared_rel_pos, keep)
    branches = (
        Branch("attention", self.norm1, lambda n: self.ls1(attend(n)), self.drop_path1),
        Branch("mlp", self.norm2, lambda n: self.ls2(self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def _res_post_forward(
    self: ResPostRelPosBlock, x: Tensor, shared_rel_pos: Tensor | None = None, keep: int | None = None
) -> Tensor:
    attend = _attention_of(self, _res_post_keys_values, shared_rel_pos, keep)
    branches = (
        Branch("attention", _itself, lambda n: self.norm1(attend(n)), self.drop_path1),
        Branch("mlp", _itself, lambda n: self.norm2(self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def _keys_values(attn: RelPosAttention, normed: Tensor) -> token.KeysValues:
    k, v = token.fused_rows(attn, normed, 1, 3).unbind(0)
    return attn.k_norm(k), v


def prompt_keys_values(block: RelPosBlock, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    return _keys_values(block.attn, block.norm1(prompts))


def _res_post_keys_values(block: ResPostRelPosBlock, prompts: Tensor) -> token.KeysValues:
    return _keys_values(block.attn, prompts)


def _parts(block: nn.Module) -> dict[str, Part]:
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp)


def _family(name: str, forward: Callable, keys_values: Callable) -> Family:
    return Family(
        name=f"deltalens.backbones.timm.relpos:{name}",
        methods={"forward": forward},
        slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
        parts=_parts,
        width=lambda block: block.attn.qkv.in_features,
        keys_values=keys_values,
        readers=lambda block: {"attention.pre": token.attention_readers(), "mlp.pre": token.mlp_readers()},
    )


BLOCK = _family("BLOCK", _block_forward, prompt_keys_values)
RES_POST = _family("RES_POST", _res_post_forward, _res_post_keys_values)


# ------------------------------------------------------------------ the owner of the tokens
def _owner_forward(self: VisionTransformerRelPos, x: Tensor) -> Tensor:
    if not token_owner.head_reads_class_row_only(self, VisionTransformerRelPos, (BLOCK, RES_POST)):
        return token_owner.whole_forward(self, x)
    images, x = x, self.patch_embed(x)
    x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
    shared = {"shared_rel_pos": self.shared_rel_pos.get_bias() if self.shared_rel_pos is not None else None}
    return token_owner.logits(self, images, self.norm(token_owner.class_row(self, x, lambda block: shared)))


OWNER = token_owner.owner_family(
    "deltalens.backbones.timm.relpos:OWNER", _owner_forward, forward_head=token_owner.forward_head
)
OTHER_HEAD = Family(
    name="deltalens.backbones.timm.relpos:OTHER_HEAD",
    methods={"forward_intermediates": token_owner.forward_intermediates},
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every VisionTransformerRelPos in the tree."""
    families = {RelPosBlock.forward: BLOCK, ResPostRelPosBlock.forward: RES_POST}
    for path, owner in model.named_modules():
        if not isinstance(owner, VisionTransformerRelPos) or not len(owner.blocks):
            continue
        tower = token_owner.new_tower(owner)
        for i, block in enumerate(owner.blocks):
            family = families.get(original_class(block).forward, UNKNOWN_BLOCK)
            if family is not UNKNOWN_BLOCK and original_class(block.attn).forward is not RelPosAttention.forward:
                family = UNKNOWN_BLOCK
            tower.add(f"blocks.{i}", block, family, owner.embed_dim, owner.patch_embed.grid_size)
            if family is not UNKNOWN_BLOCK:
                tower.always.append(Site(f"blocks.{i}.attn", block.attn, ATTENTION, owner.embed_dim, tower=tower))
        token_owner.set_owner(tower, owner, OWNER, VisionTransformerRelPos, OTHER_HEAD)
        yield path, tower
