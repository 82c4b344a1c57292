"""open_clip's transformer blocks, of image and text towers alike: nn.MultiheadAttention, or open_clip's own attention.

`ResidualAttentionBlock` holds an nn.MultiheadAttention; streams may be (N, B, C) where its `batch_first` is off. The
slots see (B, N, C) either way. `CustomResidualAttentionBlock` holds open_clip's `Attention`: a fused projection that is
read as a parameter, qk-norm, head scales, an inner norm; `out_proj` is called there. With scaled cosine attention
open_clip 3.3's forward fails, and such blocks are not read. Cross-attention blocks get no adapters.
"""

from __future__ import annotations

from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

from deltalens.backbones import multihead
from deltalens.backbones.multihead import (
    MULTIHEAD,
    fitted_mask,
    is_known,
    keys_values_of,
    longer,
    self_attention,
    split_heads,
    visible,
)
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import Keep, attention, kept
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import is_changed, linear_rows


# ------------------------------------------------------------------ blocks
def _run(block: nn.Module, x: Tensor, attend, keep: Keep | None) -> Tensor:
    """Both branches, and no added tokens behind the last block. attend: normed stream -> update."""
    slots = block.delta
    branches = (
        Branch("attention", block.ln_1, lambda n: block.ls_1(attend(n)), nn.Identity()),
        Branch("mlp", block.ln_2, lambda n: block.ls_2(block.mlp(n)), nn.Identity()),
    )
    x = residual_block(slots, slots.layout, slots.tokens("words.in", x, slots.layout), branches, keep)
    leaves = slots.last and keep is None and not slots.live("tokens.kept")
    return slots.layout.trim(x) if leaves else x


def _block_forward(
    self: ResidualAttentionBlock,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """k_x and v_x are None in self-attention blocks; open_clip ignores them there, too."""
    attn_mask = None if attn_mask is None else attn_mask.to(q_x.dtype)

    def attend(normed: Tensor) -> Tensor:
        return self_attention(self.delta, self.attn, self.ln_1, normed, attn_mask, keep)

    if self.attn.batch_first:
        return _run(self, q_x, attend, keep)
    return _run(self, q_x.transpose(0, 1), attend, keep).transpose(0, 1)


def _custom_forward(
    self: CustomResidualAttentionBlock, x: Tensor, attn_mask: Tensor | None = None, keep: Keep | None = None
) -> Tensor:
    def attend(normed: Tensor) -> Tensor:
        return self.ln_attn(_custom_attention(self.delta, self, normed, attn_mask, keep))

    return _run(self, x, attend, keep)


def _parts(block: nn.Module) -> dict[str, Part]:
    width = _width(block)
    parts = {name: Part("attn", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("attn.out_proj"), "fc1": Part("mlp.c_fc"), "fc2": Part("mlp.c_proj")}


def _width(block: nn.Module) -> int:
    return block.attn.out_proj.out_features


def _readers(block: nn.Module) -> dict[str, tuple[str, ...]]:
    return {"attention.pre": ("attn",), "mlp.pre": ("mlp.c_fc",)}


_VISION = RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"}
# positions of words are counted from the front, by mask and pooling: nothing is inserted, words may be replaced
_TEXT = _VISION - {"tokens.in", "tokens.out"} | {"words.in"}


def _family(name: str, forward, slots: frozenset[str], keys_values) -> Family:
    return Family(
        name=f"deltalens.backbones.open_clip.blocks:{name}",
        methods={"forward": forward},
        slots=slots,
        parts=_parts,
        width=_width,
        keys_values=keys_values,
        readers=_readers,
    )


def _keys_values(block: ResidualAttentionBlock, prompts: Tensor) -> multihead.KeysValues:
    return keys_values_of(block.attn, block.ln_1(prompts))


def _custom_keys_values(block: CustomResidualAttentionBlock, prompts: Tensor) -> multihead.KeysValues:
    k, v = keys_values_of(block.attn, block.ln_1(prompts))
    return block.attn.ln_k(k), v


BLOCK = _family("BLOCK", _block_forward, _VISION, _keys_values)
TEXT_BLOCK = _family("TEXT_BLOCK", _block_forward, _TEXT, _keys_values)
CUSTOM_BLOCK = _family("CUSTOM_BLOCK", _custom_forward, _VISION, _custom_keys_values)
CUSTOM_TEXT_BLOCK = _family("CUSTOM_TEXT_BLOCK", _custom_forward, _TEXT, _custom_keys_values)


# ------------------------------------------------------------------ open_clip's own attention
def _custom_attention(
    slots: Slots, block: CustomResidualAttentionBlock, normed: Tensor, attn_mask: Tensor | None, keep: Keep | None
) -> Tensor:
    attn, prompts = block.attn, [module(normed) for module in slots.live("attention.prompts")]
    if not prompts and not slots.live("attention.mask") and keep is None:
        return attn(normed, attn_mask=attn_mask)
    mask = slots.mask(visible(attn_mask, attn.num_heads), normed, slots.layout)
    return _attend(attn, normed, [p if isinstance(p, tuple) else _custom_keys_values(block, p) for p in prompts], mask,
                   keep)  # fmt: skip


def _attend(attn: Attention, x: Tensor, keys_values: list, mask: Tensor | None, keep: Keep | None) -> Tensor:
    """open_clip's Attention.forward, its projection with weight modules; mask as scaled_dot_product_attention's."""
    width, heads = x.shape[-1], attn.num_heads
    if keep is None:
        q, k, v = linear_rows(attn, x, 0, 3 * width).chunk(3, -1)
        q = q.clone() if keys_values else q  # else backward would keep all of them beside the longer k and v
    else:
        q = linear_rows(attn, kept(x, keep), 0, width)
        k, v = linear_rows(attn, x, width, 3 * width).chunk(2, -1)
    q, k, v = (split_heads(part, heads) for part in (q, k, v))
    q, k = attn.ln_q(q), attn.ln_k(k)
    k, v = longer(keys_values, k, v)
    mask = fitted_mask(mask, q, k.shape[2] - x.shape[1], keep)
    y = attention(q, k, v, mask, attn.attn_drop.p if attn.training else 0.0, fused=True)
    y = y if attn.head_scale is None else y * attn.head_scale
    return attn.out_drop(attn.out_proj(attn.ln_inner(y.transpose(1, 2).flatten(2))))


def _attention_forward(self: Attention, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if not is_changed(self):  # out_proj is called by the library
        return original_method(self, "forward")(x, attn_mask)
    return _attend(self, x, [], visible(attn_mask, self.num_heads), None)


CUSTOM_ATTENTION = Family(
    name="deltalens.backbones.open_clip.blocks:CUSTOM_ATTENTION", methods={"forward": _attention_forward}
)


# ------------------------------------------------------------------ adding them to a tower
def add_block(tower: Tower, path: str, block: nn.Module, text: bool = False, grid: tuple[int, int] | None = None):
    """Add a block of either kind, and its attention as a caller. Blocks with a forward of their own are unknown."""
    family, caller = _reading(block, text)
    width = block.attn.out_proj.out_features
    tower.add(path, block, family, width, grid)
    if caller is not None:
        tower.callers.append(Site(f"{path}.attn", block.attn, caller, width, tower=tower))


def _reading(block: nn.Module, text: bool) -> tuple[Family, Family | None]:
    """How a block is read, and its attention where a weight in it changes."""
    cls, attn = original_class(block), block.attn
    plain = (ResidualAttentionBlock.forward, ResidualAttentionBlock.attention)
    if (cls.forward, getattr(cls, "attention", None)) == plain and is_known(attn) and not hasattr(block, "ln_1_kv"):
        return (TEXT_BLOCK if text else BLOCK), MULTIHEAD
    custom = cls.forward is CustomResidualAttentionBlock.forward and original_class(attn).forward is Attention.forward
    if custom and not attn.scaled_cosine:
        return (CUSTOM_TEXT_BLOCK if text else CUSTOM_BLOCK), CUSTOM_ATTENTION
    return UNKNOWN_BLOCK, None
