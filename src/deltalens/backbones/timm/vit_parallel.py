"""timm's blocks with attention and MLP side by side behind one norm (ViT-22B), plain and differential.

    y = x + drop_path(ls( attention's projection + MLP's projection ))        both of n = norm(x)

One residual step, so `block.stream` stands behind both branches and there is no `attention.stream` or `mlp.stream`.
`attention.pre` and `mlp.pre` change what either branch reads of n. `attention.inner` and `mlp.inner` exist where each
branch has an output layer of its own (`SCALING`); they stand behind its LayerScale. A fused output layer
(`FUSED_SCALING`, `DIFF_SCALING`) has one output, on which `mlp.inner` stands, as in blocks with a single branch.

Parts are rows of the fused `in_proj`: fc1, q, k, v; and `proj`, `fc2`, or `out_proj` where it is fused.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.sites.anatomy import Family, Part
from deltalens.sites.attention import attention
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows

ScalingBlock = ParallelScalingBlock | DiffParallelScalingBlock


# ------------------------------------------------------------------ queries, keys, values
def _is_differential(block: ScalingBlock) -> bool:
    return original_class(block).forward is DiffParallelScalingBlock.forward


def _heads(block: ScalingBlock, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, heads, N, head_dim) as v."""
    return x.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)


def _query_heads(block: ScalingBlock, x: Tensor) -> Tensor:
    """(B, N, C) -> heads as q and k; half heads in differential attention."""
    return token.half_heads(x, block) if _is_differential(block) else _heads(block, x)


def prompt_keys_values(block: ScalingBlock, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    hidden, width = block.in_split[0], block.in_split[1]
    rows = linear_rows(block.in_proj, block.in_norm(prompts), hidden + width, hidden + 3 * width)
    k, v = rows.chunk(2, -1)
    k = block.k_norm(_query_heads(block, k))
    return (token.pairs(k, block.num_heads) if _is_differential(block) else k), _heads(block, v)


def _attend(
    block: ScalingBlock,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys_values: list[token.KeysValues],
    mask: Tensor | None,
) -> Tensor:
    """Attention of (B, N, C) queries, keys and values: (B, queries, C)."""
    q, k = block.q_norm(_query_heads(block, q)), block.k_norm(_query_heads(block, k))
    if _is_differential(block):
        return token.differential(block, q, k, _heads(block, v), keys_values, mask)
    k, v = token.with_prompts(k, _heads(block, v), keys_values)
    dropout = block.attn_drop.p if block.training else 0.0
    return attention(q, k, v, mask, dropout, block.fused_attn).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------ the block
def _project_in(block: ScalingBlock, normed: Tensor, keep: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(MLP's hidden channels, q, k, v); the first two of the first `keep` tokens only."""
    slots, layout = block.delta, block.delta.layout
    if keep is None and not slots.live("attention.pre") and not slots.live("mlp.pre"):
        hidden, q, k, v = block.in_proj(normed).split(block.in_split, -1)
    else:
        width, total = block.in_split[0], sum(block.in_split)
        read = slots.chain("attention.pre", normed, layout)
        read_by_mlp = slots.chain("mlp.pre", normed if keep is None else normed[:, :keep], layout)
        hidden = linear_rows(block.in_proj, read_by_mlp, 0, width)
        if keep is None:
            q, k, v = linear_rows(block.in_proj, read, width, total).chunk(3, -1)
        else:
            q = linear_rows(block.in_proj, read[:, :keep], width, width + block.in_split[1])
            k, v = linear_rows(block.in_proj, read, width + block.in_split[1], total).chunk(2, -1)
    return (hidden if block.mlp_bias is None else hidden + block.mlp_bias), q, k, v


def _project_out(block: ScalingBlock, attended: Tensor, hidden: Tensor, new_tokens: list[Tensor]) -> Tensor:
    """What is added to the stream, without drop path. Tokens that modules make are appended to new_tokens."""
    slots, layout = block.delta, block.delta.layout
    if block.out_proj is not None:
        return slots.chain("mlp.inner", block.ls(block.out_proj(torch.cat((attended, hidden), -1))), layout, new_tokens)
    of_attention, of_mlp = block.attn_out_proj(attended), block.mlp_out_proj(hidden)
    if not slots.live("attention.inner") and not slots.live("mlp.inner"):
        return block.ls(of_attention + of_mlp)
    of_attention = slots.chain("attention.inner", block.ls(of_attention), layout, new_tokens)
    return of_attention + slots.chain("mlp.inner", block.ls(of_mlp), layout, new_tokens)


def _forward(
    self: ScalingBlock, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, keep: int | None = None
) -> Tensor:
    slots, layout = self.delta, self.delta.layout
    x = slots.tokens("tokens.in", x, layout)
    normed = self.in_norm(x)
    mask = slots.mask(attn_mask, normed, layout)
    prompts = [module(normed) for module in slots.live("attention.prompts")]
    keys_values = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
    mask = token.whole_mask(mask, is_causal, normed, sum(k.shape[2] for k, _ in keys_values))
    hidden, q, k, v = _project_in(self, normed, keep)
    if keep is not None:
        x, normed = x[:, :keep], normed[:, :keep]
        mask = mask[..., :keep, :] if mask is not None and mask.shape[-2] > 1 else mask
    new_tokens: list[Tensor] = []
    attended = _attend(self, q, k, v, keys_values, mask)
    update = _project_out(self, attended, self.mlp_drop(self.mlp_act(hidden)), new_tokens)
    for slot in ("attention.parallel", "mlp.parallel"):
        dropped, tokens = slots.parallel(slot, x, normed, layout, in_drop_path=True)
        update, new_tokens = (update if dropped is None else update + dropped), new_tokens + tokens
    y = x + self.drop_path(update)
    for slot in ("attention.parallel", "mlp.parallel", "block.parallel"):
        delta, tokens = slots.parallel(slot, x, normed, layout)
        y, new_tokens = (y if delta is None else y + delta), new_tokens + tokens
    y = slots.chain("block.stream", y, layout)
    for added in new_tokens:
        y = layout.insert(y, added)
    return token_owner.leave(slots, slots.tokens("tokens.out", y, layout), keep)


def _parts(block: ScalingBlock) -> dict[str, Part]:
    hidden, width = block.in_split[0], block.in_split[1]
    parts = {"fc1": Part("in_proj", (0, hidden))}
    parts |= {name: Part("in_proj", (hidden + i * width, hidden + (i + 1) * width)) for i, name in enumerate("qkv")}
    if block.out_proj is not None:
        return parts | {"out_proj": Part("out_proj")}
    return parts | {"proj": Part("attn_out_proj"), "fc2": Part("mlp_out_proj")}


_SLOTS = frozenset(
    {"attention.pre", "attention.parallel", "attention.prompts", "attention.mask"}
    | {"mlp.pre", "mlp.inner", "mlp.parallel", "block.parallel", "block.stream", "tokens.in", "tokens.out"}
)


def _family(name: str, slots: frozenset[str]) -> Family:
    return Family(
        name=f"deltalens.backbones.timm.vit_parallel:{name}",
        methods={"forward": _forward},
        slots=slots,
        parts=_parts,
        width=lambda block: block.in_split[1],
        keys_values=prompt_keys_values,
    )


SCALING = _family("SCALING", _SLOTS | {"attention.inner"})
FUSED_SCALING = _family("FUSED_SCALING", _SLOTS)
DIFF_SCALING = _family("DIFF_SCALING", _SLOTS)
