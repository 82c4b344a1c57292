"""Attention over all tokens in timm's classes, with prompts as further keys and values, for all queries or the first.

=================  =======================================================================================
class              what it adds
=================  =======================================================================================
`Attention`        q- and k-norm, scale norm, gate
`AttentionRope`    the same, separate q, k, v layers, fewer key heads than query heads, rotary embeddings
`EvaAttention`     the same, biases of q and v that are kept apart from the qkv layer, rotary embeddings
`DiffAttention`    softmax(q_1 k_1) - lambda softmax(q_2 k_2), two half heads for each head
=================  =======================================================================================

Prompts get no rotation, and neither do tokens that adapters put behind the prefix: the last tokens of the stream, as
many as the rotary embedding has, are turned and no others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from deltalens.sites.anatomy import Family, Part
from deltalens.sites.attention import attention
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import linear_rows, transforms_output

KeysValues = tuple[Tensor, Tensor]


# ------------------------------------------------------------------ queries, keys and values
def spliced_bias(attn: nn.Module) -> Tensor | None:
    """The bias of a fused qkv layer that its attention keeps apart, None where there is none."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def own_bias(attn: nn.Module) -> None:
    """Give the qkv layer the biases that its attention keeps apart; the attention's own forward then calls it."""
    if (bias := spliced_bias(attn)) is not None:
        attn.qkv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        attn.q_bias = attn.k_bias = attn.v_bias = None


def width_of(attn: nn.Module) -> int:
    """Channels of q. The layers are not asked: wrappers of other libraries do not say."""
    halves = 2 if is_differential(attn) else 1
    return halves * attn.num_heads * getattr(attn, "head_dim", round(attn.scale**-2))


def fused_rows(attn: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    """Thirds first:last (q, k, v) of the fused qkv layer's output, as tensors (last - first, B, heads, N, head_dim)."""
    bias, width = spliced_bias(attn), width_of(attn)
    if bias is None and (first, last) == (0, 3):
        y = attn.qkv(x)
    else:
        y = linear_rows(attn.qkv, x, first * width, last * width, bias)
    return y.unflatten(-1, (last - first, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def _split_heads(layer: nn.Module, x: Tensor, heads: int) -> Tensor:
    return layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)


def _keys_values(attn: nn.Module, x: Tensor) -> KeysValues:
    if getattr(attn, "qkv", None) is None:
        heads = getattr(attn, "num_kv_heads", attn.num_heads)
        k, v = _split_heads(attn.k_proj, x, heads), _split_heads(attn.v_proj, x, heads)
    else:
        k, v = fused_rows(attn, x, 1, 3).unbind(0)
    return attn.k_norm(k), v


def _project(attn: nn.Module, x: Tensor, keep: int | None, copy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q of the first `keep` tokens, k and v of all. copy: q becomes a tensor of its own, so that backward does not keep
    all of qkv beside longer keys and values."""
    if keep is None and getattr(attn, "qkv", None) is not None:
        q, k, v = fused_rows(attn, x, 0, 3).unbind(0)
        return attn.q_norm(q.clone() if copy else q), attn.k_norm(k), v
    queried = x[:, :keep]
    if getattr(attn, "qkv", None) is None:
        q = _split_heads(attn.q_proj, queried, attn.num_heads)
    else:
        q = fused_rows(attn, queried, 0, 1)[0]
    return attn.q_norm(q), *_keys_values(attn, x)


def _turned(attn: nn.Module, x: Tensor, rope: Tensor, start: int) -> Tensor:
    """Tokens from `start` on rotated."""
    half = getattr(attn, "rotate_half", False)
    return torch.cat([x[:, :, :start], apply_rot_embed_cat(x[:, :, start:], rope, half=half)], 2)


def with_prompts(k: Tensor, v: Tensor, keys_values: list[KeysValues]) -> KeysValues:
    """Keys and values (B, heads, N, d) with those of prompts before them."""
    for extra_k, extra_v in keys_values:
        k = torch.cat([extra_k.to(k.dtype).expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([extra_v.to(v.dtype).expand(v.shape[0], -1, -1, -1), v], 2)
    return k, v


def whole_mask(mask: Tensor | None, causal: bool, x: Tensor, prompts: int) -> Tensor | None:
    """The mask of N tokens for N queries and prompts + N keys; prompts are visible."""
    if causal:
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if mask is None or mask.dtype == torch.bool:
            mask = visible if mask is None else visible & mask
        else:
            mask = mask.masked_fill(~visible, float("-inf"))
    if mask is not None and prompts:
        mask = F.pad(mask, (prompts, 0), value=True if mask.dtype == torch.bool else 0.0)
    return mask


def widened(bias: Tensor, prefix: int, length: int) -> Tensor:
    """A bias (..., n, n) for `length` tokens: those that adapters put behind the prefix tokens have none."""
    added = length - bias.shape[-1]
    if not added:
        return bias
    bias = torch.cat([bias[..., :prefix], bias.new_zeros(*bias.shape[:-1], added), bias[..., prefix:]], -1)
    rows = bias.new_zeros(*bias.shape[:-2], added, bias.shape[-1])
    return torch.cat([bias[..., :prefix, :], rows, bias[..., prefix:, :]], -2)


# ------------------------------------------------------------------ the layer as a whole
def _attend_softmax(
    attn: nn.Module,
    x: Tensor,
    keys_values: list[KeysValues],
    mask: Tensor | None = None,
    is_causal: bool = False,
    keep: int | None = None,
    rope: Tensor | None = None,
) -> Tensor:
    queried = x if keep is None else x[:, :keep]
    q, k, v = _project(attn, x, keep, bool(keys_values))
    if rope is not None:
        start = x.shape[1] - rope.shape[-2]
        q = (_turned(attn, q, rope, start) if keep is None else q).type_as(v)
        k = _turned(attn, k, rope, start).type_as(v)
    k, v = with_prompts(k, v, keys_values)
    if getattr(attn, "num_kv_groups", 1) > 1:
        k, v = (t.repeat_interleave(attn.num_kv_groups, 1) for t in (k, v))
    mask = whole_mask(mask, is_causal, x, k.shape[2] - x.shape[1])
    if mask is not None and keep is not None and mask.shape[-2] > 1:
        mask = mask[..., :keep, :]
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attention(q, k, v, mask, dropout, attn.fused_attn).transpose(1, 2).flatten(2)
    y = attn.norm(y) if hasattr(attn, "norm") else y
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(queried).sigmoid()
    return attn.proj_drop(attn.proj(y))


def pairs(x: Tensor, heads: int) -> Tensor:
    """(B, 2 heads, N, d) half heads -> (B, heads, N, 2 d)."""
    return x.unflatten(1, (heads, 2)).transpose(2, 3).flatten(3)


def differential(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, keys_values: list[KeysValues], mask: Tensor | None
) -> Tensor:
    """Differential attention of q and k (B, 2 heads, N, d) and v (B, heads, N, 2 d), normed: (B, N, heads * 2 d).

    layer: timm's `DiffAttention` or a block that computes it itself. Keys of prompts come as pairs, (B, heads, p, 2 d).
    """
    q, k = pairs(q, layer.num_heads), pairs(k, layer.num_heads)
    k, v = with_prompts(k, v, keys_values)
    dropout = layer.attn_drop_p if layer.training else 0.0
    first, second = (
        attention(q_half, k_half, v, mask, dropout, layer.fused_attn)
        for q_half, k_half in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
    )
    y = first - layer._compute_lambda().type_as(q) * second
    return (layer.sub_norm(y) * (1 - layer.lambda_init)).transpose(1, 2).flatten(2)


def half_heads(x: Tensor, layer: nn.Module) -> Tensor:
    """(B, N, heads * 2 d) -> (B, 2 heads, N, d), as q and k of differential attention."""
    return x.unflatten(-1, (2 * layer.num_heads, layer.head_dim)).transpose(1, 2)


def _diff_rows(attn: DiffAttention, x: Tensor, start: int, stop: int) -> Tensor:
    """Thirds start:stop of the qkv layer's output, (B, N, ...)."""
    width = width_of(attn)
    return attn.qkv(x) if (start, stop) == (0, 3) else linear_rows(attn.qkv, x, start * width, stop * width)


def _diff_keys_values(attn: DiffAttention, x: Tensor) -> KeysValues:
    k, v = _diff_rows(attn, x, 1, 3).chunk(2, -1)
    v = v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return pairs(attn.k_norm(half_heads(k, attn)), attn.num_heads), v


def _attend_diff(
    attn: DiffAttention,
    x: Tensor,
    keys_values: list[KeysValues],
    mask: Tensor | None = None,
    is_causal: bool = False,
    keep: int | None = None,
) -> Tensor:
    if keep is None:
        q, k, v = _diff_rows(attn, x, 0, 3).chunk(3, -1)
    else:
        q, (k, v) = _diff_rows(attn, x[:, :keep], 0, 1), _diff_rows(attn, x, 1, 3).chunk(2, -1)
    q, k = attn.q_norm(half_heads(q, attn)), attn.k_norm(half_heads(k, attn))
    v = v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    mask = whole_mask(mask, is_causal, x, sum(extra.shape[2] for extra, _ in keys_values))
    if mask is not None and keep is not None and mask.shape[-2] > 1:
        mask = mask[..., :keep, :]
    y = differential(attn, q, k, v, keys_values, mask)
    return attn.proj_drop(attn.proj(attn.norm(y)))


_SOFTMAX = (Attention.forward, AttentionRope.forward, EvaAttention.forward)


def is_softmax(attn: nn.Module) -> bool:
    """Whether an attention is one of those read here that take a plain softmax."""
    return original_class(attn).forward in _SOFTMAX


def is_differential(attn: nn.Module) -> bool:
    return original_class(attn).forward is DiffAttention.forward


def attend(attn: nn.Module, x: Tensor, keys_values: list[KeysValues], *args: Any, **kwargs: Any) -> Tensor:
    """attn(x) with further keys and values. x: normed tokens (B, N, C).

    Further arguments: mask, is_causal, keep (only the first `keep` tokens are computed), rope.
    """
    return (_attend_diff if is_differential(attn) else _attend_softmax)(attn, x, keys_values, *args, **kwargs)


def prompt_keys_values(attn: nn.Module, prompts: Tensor) -> KeysValues:
    """Normed prompts (1 or B, p, C) -> keys and values, each (1 or B, key heads, p, head_dim)."""
    return (_diff_keys_values if is_differential(attn) else _keys_values)(attn, prompts)


# ------------------------------------------------------------------ linear parts
def attention_parts(attn: nn.Module, path: str = "attn") -> dict[str, Part]:
    """q, k, v, proj, and gate where there is one."""
    if getattr(attn, "qkv", None) is None:
        parts = {name: Part(f"{path}.{name}_proj") for name in "qkv"}
    else:
        width = width_of(attn)
        parts = {name: Part(f"{path}.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    gate = {"gate": Part(f"{path}.gate")} if getattr(attn, "gate", None) is not None else {}
    return parts | {"proj": Part(f"{path}.proj")} | gate


def mlp_parts(mlp: nn.Module, path: str = "mlp") -> dict[str, Part]:
    """fc1 and fc2; fc1_g and fc1_x where gate and value have a layer each."""
    return {name: Part(f"{path}.{name}") for name in ("fc1", "fc1_g", "fc1_x", "fc2") if hasattr(mlp, name)}


def attention_readers(path: str = "attn") -> tuple[str, ...]:
    """Layers that read what attention is given."""
    return tuple(f"{path}.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"))


def mlp_readers(path: str = "mlp") -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in ("fc1", "fc1_g", "fc1_x"))


# ------------------------------------------------------------------ layers that go wrong by themselves
def _rope_forward(
    self: nn.Module,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """timm's own forward, unless a module changes the qkv layer that it goes around, or the prefix is longer than it
    knows."""
    aligned = rope is None or x.shape[1] - rope.shape[-2] == self.num_prefix_tokens
    if aligned and not goes_around(self):
        return original_method(self, "forward")(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    return attend(self, x, [], attn_mask, is_causal, rope=rope)


def goes_around(attn: nn.Module) -> bool:
    """Whether the attention's own forward reads the weight of a layer that adapters changed."""
    return getattr(attn, "q_bias", None) is not None and type(attn.qkv) is not nn.Linear


def own_bias_before_merge(attn: nn.Module) -> None:
    """Where modules change the output of the qkv layer, they change its bias too."""
    changes = attn.qkv.delta.changes() if goes_around(attn) and "delta" in attn.qkv._modules else ()
    if any(transforms_output(module) for _, _, module in changes):
        own_bias(attn)


def own_bias_before_fold(block: nn.Module) -> None:
    """RepAdapter's layers before attention become part of the qkv layer, and change its bias."""
    if any(hasattr(module, "affine") for module in block.delta.live("attention.pre")):
        own_bias(block.attn)


ROPE_ATTENTION = Family(
    name="deltalens.backbones.timm.token_attention:ROPE_ATTENTION",
    methods={"forward": _rope_forward},
    before_merge=own_bias_before_merge,
)
