"""nn.MultiheadAttention, for every library whose blocks hold one: parts, prompts, masks.

Its forward reads `in_proj_weight` (q, k and v in one matrix) and the weight of `out_proj` itself, and never calls
`out_proj`: an adapter in that layer would do nothing. Two readings make each weight count.

* `MULTIHEAD` is the module's own forward with weight modules: q, k, v = W_in x + b_in with the changes of their rows,
  then `out_proj` is called. It is swapped in when one of these weights changes; without active changes it is the
  library's forward.
* `self_attention` is what a block computes of its normed stream: the library's module as it is, or, where the block's
  slots need it, the same with prompts as further keys and values, another mask, or fewer queries.

Masks of nn.MultiheadAttention say what is hidden (boolean, True: hidden) or what is added. Modules in `attention.mask`
slots get and give masks as scaled_dot_product_attention reads them: boolean, True: visible, or additive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.sites.anatomy import Family, Part
from deltalens.sites.attention import Keep, attention, kept, kept_rows
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import is_changed, linear_rows

KeysValues = tuple[Tensor, Tensor]


def is_known(attn: nn.Module) -> bool:
    """Whether this is an nn.MultiheadAttention with one fused projection and no further keys of its own."""
    return (
        isinstance(attn, nn.MultiheadAttention)
        and original_class(attn).forward is nn.MultiheadAttention.forward
        and attn.in_proj_weight is not None
        and attn.bias_k is None
        and not attn.add_zero_attn
    )


def parts(path: str, attn: nn.MultiheadAttention) -> dict[str, Part]:
    """q, k, v and proj of the attention at a path in its block."""
    width = attn.embed_dim
    return {name: Part(path, (i * width, (i + 1) * width)) for i, name in enumerate("qkv")} | {
        "proj": Part(f"{path}.out_proj")
    }


# ------------------------------------------------------------------ pieces
def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def keys_values_of(attn: nn.Module, normed: Tensor) -> KeysValues:
    """Normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, d), of a fused projection."""
    width = normed.shape[-1]
    k, v = linear_rows(attn, normed, width, 3 * width).chunk(2, -1)
    return split_heads(k, attn.num_heads), split_heads(v, attn.num_heads)


def longer(keys_values: Sequence[KeysValues], k: Tensor, v: Tensor) -> KeysValues:
    """Keys and values (B, heads, N, d) with further ones in front."""
    for extra_k, extra_v in keys_values:
        k = torch.cat([extra_k.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([extra_v.to(v.dtype).expand(v.shape[0], -1, -1, -1), v], 2)
    return k, v


def visible(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask of nn.MultiheadAttention, (N, S) or (B * heads, N, S), as scaled_dot_product_attention reads it."""
    if mask is None:
        return None
    mask = ~mask if mask.dtype == torch.bool else mask
    return mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads))


def fitted_mask(mask: Tensor | None, q: Tensor, extra: int, keep: Keep | None) -> Tensor | None:
    """The mask for queries q, those of `kept` alone, with `extra` further keys in front, which everyone sees."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    mask = mask if keep is None or mask.shape[-2] == 1 else kept_rows(mask, keep)
    return F.pad(mask, (extra, 0), value=True if mask.dtype == torch.bool else 0.0) if extra else mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def may_keep_class_row_only(slots: Slots) -> bool:
    """Whether no module in a block reads or writes other tokens than the one it is at, attention apart."""
    return all(
        getattr(module, "pointwise", False)
        for slot in slots._modules
        if slot not in ("attention_prompts", "tokens_in", "words_in")  # they act before the block
        for module in slots.live(slot)
    )


# ------------------------------------------------------------------ the module with weight modules
def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not is_changed(self) and not is_changed(self.out_proj):
        return original_method(self, "forward")(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    batched, same = query.dim() == 3, query is key and key is value
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    width, heads = self.embed_dim, self.num_heads
    if same:
        q, k, v = linear_rows(self, query, 0, 3 * width).chunk(3, -1)
    else:
        q, k, v = (linear_rows(self, x, i * width, (i + 1) * width) for i, x in enumerate((query, key, value)))
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    mask = visible(attn_mask, heads)
    if mask is None and is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, None]
        padding = _additive(~hidden if hidden.dtype == torch.bool else hidden, q)
        mask = padding if mask is None else _additive(mask, q) + padding
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + _additive(mask, q)).softmax(-1)
        y = F.dropout(weights, dropout) @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        y = attention(q, k, v, fitted_mask(mask, q, 0, None), dropout, fused=True)
    y = self.out_proj(y.transpose(1, 2).flatten(2))
    if not batched:
        return y.squeeze(0), weights
    return (y if self.batch_first else y.transpose(0, 1)), weights


MULTIHEAD = Family(name="deltalens.backbones.multihead:MULTIHEAD", methods={"forward": _forward})


# ------------------------------------------------------------------ a block's attention with its slots
def self_attention(
    slots: Slots,
    attn: nn.MultiheadAttention,
    norm: Callable[[Tensor], Tensor],
    normed: Tensor,
    attn_mask: Tensor | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """The attention of a block's normed stream (B, N, C), whatever the module's own `batch_first`.

    norm: what prompts pass before they become keys and values. attn_mask: the library's. keep: only these queries.
    """
    prompts = [module(normed) for module in slots.live("attention.prompts")]
    if not prompts and not slots.live("attention.mask") and keep is None:
        x = normed if attn.batch_first else normed.transpose(0, 1)
        y = attn(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
        return y if attn.batch_first else y.transpose(0, 1)
    mask = slots.mask(visible(attn_mask, attn.num_heads), normed, slots.layout)
    keys_values = [p if isinstance(p, tuple) else keys_values_of(attn, norm(p)) for p in prompts]
    width, heads = attn.embed_dim, attn.num_heads
    if keep is None:
        q, k, v = linear_rows(attn, normed, 0, 3 * width).chunk(3, -1)
        q = q.clone() if keys_values else q  # else backward would keep all of them beside the longer k and v
    else:
        q = linear_rows(attn, kept(normed, keep), 0, width)
        k, v = linear_rows(attn, normed, width, 3 * width).chunk(2, -1)
    k, v = longer(keys_values, split_heads(k, heads), split_heads(v, heads))
    q = split_heads(q, heads)
    mask = fitted_mask(mask, q, k.shape[2] - normed.shape[1], keep)
    y = attention(q, k, v, mask, attn.dropout if attn.training else 0.0, fused=True)
    return attn.out_proj(y.transpose(1, 2).flatten(2))
