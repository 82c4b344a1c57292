"""Attention of transformers' towers with further keys and values.

Their attention modules have q_proj, k_proj, v_proj and an output projection, and hand q, k, v to the function that
`config._attn_implementation` names: eager, sdpa or another. Here the same happens, with prompts' keys and values in
front. The module is swapped and not gone around, because `output_attentions` listens to it; the attention weights that
it returns are those of the backbone's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltalens.sites.anatomy import Family
from deltalens.sites.attention import Keep, kept, kept_rows
from deltalens.sites.layout import Layout
from deltalens.sites.swap import original_method

KeysValues = tuple[Tensor, Tensor]


def heads(attention: nn.Module, x: Tensor) -> Tensor:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def keys_values(attention: nn.Module, normed: Tensor) -> KeysValues:
    """Normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return heads(attention, attention.k_proj(normed)), heads(attention, attention.v_proj(normed))


def joined(attention: nn.Module, key: Tensor, value: Tensor, further: tuple[KeysValues, ...]) -> KeysValues:
    """Keys and values with further ones in front."""
    for extra_key, extra_value in further:
        key = torch.cat([extra_key.to(key.dtype).expand(key.shape[0], -1, -1, -1), key], 2)
        value = torch.cat([extra_value.to(value.dtype).expand(value.shape[0], -1, -1, -1), value], 2)
    return key, value


def attention_family(
    name: str,
    library: ModuleType,
    *,
    out: str = "o_proj",
    scaling: str = "scaling",
    dropout: str = "attention_dropout",
    rotate: Callable[..., KeysValues] | None = None,
) -> Family:
    """The reading of an attention module, called with `delta_keys_values=((keys, values), ...)` where there are some,
    and with `delta_keep` where only those queries are wanted (see `kept`; not where positions are rotated).

    library: the module of this family in transformers; its `eager_attention_forward` is the plain attention. out,
    scaling, dropout: names of those attributes. rotate: what turns (q, k, cos, sin) into rotated (q, k); further keys
    are not rotated.
    """

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        attention_mask: Any = None,
        delta_keys_values: tuple[KeysValues, ...] = (),
        delta_keep: Keep | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if not delta_keys_values and delta_keep is None:
            return original_method(self, "forward")(hidden_states, attention_mask, **kwargs)
        length = hidden_states.shape[1]
        asking = hidden_states if delta_keep is None else kept(hidden_states, delta_keep)
        query = heads(self, self.q_proj(asking))
        key, value = (heads(self, layer(hidden_states)) for layer in (self.k_proj, self.v_proj))
        if rotate is not None:
            query, key = rotate(query, key, *kwargs.pop("position_embeddings"))
        key, value = joined(self, key, value, delta_keys_values)
        mask = beside_prompts(attention_mask, key.shape[2] - length)
        mask = mask if mask is None or delta_keep is None else kept_rows(mask, delta_keep)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, library.eager_attention_forward
        )
        p = getattr(self, dropout) if self.training else 0.0
        y, weights = interface(self, query, key, value, mask, dropout=p, scaling=getattr(self, scaling), **kwargs)
        y = getattr(self, out)(y.reshape(*asking.shape[:-1], -1).contiguous())
        return y, None if weights is None else weights[..., -length:]

    return Family(name=name, methods={"forward": forward})


def attend(
    block: nn.Module,
    attention: nn.Module,
    normed: Tensor,
    mask: Any,
    of_prompts: Callable[[nn.Module, Tensor], KeysValues],
    keep: Keep | None = None,
    **kwargs,
) -> Tensor:
    """The block's attention on n with what is in its slots `attention.mask` and `attention.prompts`; of the rows `keep`
    alone where it is given."""
    slots = block.delta
    mask = for_added_tokens(mask, normed, slots.layout)
    if slots.live("attention.mask"):
        mask = _as_implementation_wants(slots.mask(mask, normed, slots.layout), attention, normed.dtype)
    prompts = [module(normed) for module in slots.live("attention.prompts")]
    if prompts:
        kwargs["delta_keys_values"] = tuple(p if isinstance(p, tuple) else of_prompts(block, p) for p in prompts)
    if keep is not None:
        kwargs["delta_keep"] = keep
    return attention(normed, mask, **kwargs)[0]


# ------------------------------------------------------------------ masks
def beside_prompts(mask: Any, prompts: int) -> Tensor | None:
    """A mask (..., queries, keys) with columns for prompts in front, which every query sees."""
    return None if mask is None else F.pad(_dense(mask), (prompts, 0), value=_visible(mask))


def for_added_tokens(mask: Any, x: Tensor, layout: Layout) -> Any:
    """A mask of the backbone's own tokens, with columns and rows for those that adapters added behind the prefix. All
    see them, without position bias; they see what the first token sees."""
    if mask is None or not torch.is_tensor(mask) or mask.dim() != 4 or x.shape[1] == mask.shape[-1]:
        return mask
    added, prefix = x.shape[1] - mask.shape[-1], layout.prefix
    columns = mask.new_full((*mask.shape[:-1], added), _visible(mask))
    mask = torch.cat([mask[..., :prefix], columns, mask[..., prefix:]], -1)
    if mask.shape[-2] == 1:  # one row for all queries
        return mask
    row = mask[..., :1, :]
    if mask.dtype != torch.bool:
        row = row.masked_fill(row > torch.finfo(mask.dtype).min / 2, 0.0)
    return torch.cat([mask[..., :prefix, :], row.expand(-1, -1, added, -1), mask[..., prefix:, :]], -2)


def _visible(mask: Tensor) -> bool | float:
    return True if mask.dtype == torch.bool else 0.0


def _dense(mask: Any) -> Tensor:
    if not torch.is_tensor(mask) or mask.dim() != 4:
        raise TypeError(
            "prompts together with an attention mask need the attention implementation 'sdpa' or 'eager': call "
            "model.set_attn_implementation('sdpa')"
        )
    return mask


def _as_implementation_wants(mask: Tensor | None, attention: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Eager attention adds its mask, so that a boolean one becomes 0 and the lowest number."""
    implementation = attention.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise TypeError(
            f"modules in the slot 'attention.mask' do not work with the attention implementation {implementation!r}: "
            "call model.set_attn_implementation('sdpa')"
        )
    if mask is None or mask.dtype != torch.bool or implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
