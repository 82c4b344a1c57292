"""timm's Beit (BEiT, BEiT v2): relative position biases of each block or of all, biases of q and v beside the layer.

The bias of prompts is zero, and so is that of tokens that adapters put into the stream. As in `eva`, the attention
reads its qkv layer as a layer while a module changes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.swap import original_class, original_method


# ------------------------------------------------------------------ attention
def _relative_bias(attn: Attention, shared: Tensor | None) -> Tensor | None:
    """Bias of the block's own tokens, (1, heads, N, N)."""
    if attn.relative_position_bias_table is None:
        return shared
    return attn._get_rel_pos_bias() if shared is None else attn._get_rel_pos_bias() + shared


def _attend(
    attn: Attention, x: Tensor, keys_values: list[token.KeysValues], shared: Tensor | None, keep: int | None
) -> Tensor:
    """timm's forward with further keys and values, for all tokens or the first `keep` ones."""
    queried = x if keep is None else x[:, :keep]
    if keep is None:
        q, k, v = token.fused_rows(attn, x, 0, 3).unbind(0)
        q = q.clone() if keys_values else q
    else:
        (q,), (k, v) = token.fused_rows(attn, queried, 0, 1), token.fused_rows(attn, x, 1, 3)
    k, v = token.with_prompts(k, v, keys_values)
    bias = _relative_bias(attn, shared)
    if bias is not None:
        bias = token.widened(bias, attn.__dict__["delta_layout"].prefix, x.shape[1])[..., : queried.shape[1], :]
        bias = F.pad(bias, (k.shape[2] - x.shape[1], 0)).to(q.dtype)
    y = attention(q, k, v, bias, attn.attn_drop.p if attn.training else 0.0, attn.fused_attn)
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _attention_forward(self: Attention, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm's own, unless a module changes the qkv layer that it goes around, or the stream has more tokens than the
    bias knows."""
    known = shared_rel_pos_bias if self.relative_position_index is None else self.relative_position_index
    if (known is None or known.shape[-1] == x.shape[1]) and not token.goes_around(self):
        return original_method(self, "forward")(x, shared_rel_pos_bias=shared_rel_pos_bias)
    return _attend(self, x, [], shared_rel_pos_bias, None)


ATTENTION = Family(
    name="deltalens.backbones.timm.beit:ATTENTION",
    methods={"forward": _attention_forward},
    before_merge=token.own_bias_before_merge,
)


# ------------------------------------------------------------------ the block
def prompt_keys_values(block: Block, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    k, v = token.fused_rows(block.attn, block.norm1(prompts), 1, 3).unbind(0)
    return k, v


def _block_forward(
    self: Block, x: Tensor, shared_rel_pos_bias: Tensor | None = None, keep: int | None = None
) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        if prompts or keep is not None:
            keys_values = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
            update = _attend(self.attn, normed, keys_values, shared_rel_pos_bias, keep)
        else:
            update = self.attn(normed, shared_rel_pos_bias=shared_rel_pos_bias)
        return update if self.gamma_1 is None else self.gamma_1 * update

    def mlp(normed: Tensor) -> Tensor:
        return self.mlp(normed) if self.gamma_2 is None else self.gamma_2 * self.mlp(normed)

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path1),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    return token_owner.leave(slots, residual_block(slots, slots.layout, x, branches, keep), keep)


def _parts(block: Block) -> dict[str, Part]:
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp)


BLOCK = Family(
    name="deltalens.backbones.timm.beit:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=_parts,
    width=lambda block: block.attn.qkv.in_features,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": token.attention_readers(), "mlp.pre": token.mlp_readers()},
    before_merge=token.own_bias_before_fold,
)


# ------------------------------------------------------------------ the owner of the tokens
def _owner_forward(self: Beit, x: Tensor) -> Tensor:
    if not token_owner.head_reads_class_row_only(self, Beit, (BLOCK,)):
        return token_owner.whole_forward(self, x)
    images, x = x, self.patch_embed(x)
    x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
    x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
    shared = {"shared_rel_pos_bias": self.rel_pos_bias() if self.rel_pos_bias is not None else None}
    return token_owner.logits(self, images, self.norm(token_owner.class_row(self, x, lambda block: shared)))


OWNER = token_owner.owner_family(
    "deltalens.backbones.timm.beit:OWNER", _owner_forward, forward_head=token_owner.forward_head
)
OTHER_HEAD = Family(
    name="deltalens.backbones.timm.beit:OTHER_HEAD",
    methods={"forward_intermediates": token_owner.forward_intermediates},
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every Beit in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, Beit) or not len(owner.blocks):
            continue
        tower = token_owner.new_tower(owner)
        for i, block in enumerate(owner.blocks):
            known = original_class(block).forward is Block.forward
            known = known and original_class(block.attn).forward is Attention.forward
            family = BLOCK if known else UNKNOWN_BLOCK
            tower.add(f"blocks.{i}", block, family, owner.embed_dim, owner.patch_embed.grid_size)
            if known:
                tower.always.append(Site(f"blocks.{i}.attn", block.attn, ATTENTION, owner.embed_dim, tower=tower))
        token_owner.set_owner(tower, owner, OWNER, Beit, OTHER_HEAD)
        yield path, tower
