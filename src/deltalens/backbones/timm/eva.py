"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs; rotary embeddings, SwiGLU, gates, registers.

`EvaBlock` is pre-norm, `EvaBlockPostNorm` is x + norm(attn(x)): what its branches read, n, is x itself. Prompts are not
rotated, and neither are tokens that adapters put into the stream (see `token_attention`). EVA's attention multiplies
with the weight of its qkv layer itself, to splice in biases of q and v: while a module changes that layer, the
attention reads it as a layer. Merging changes of the output (SSF, RepAdapter) gives the layer those biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.swap import original_class


def _itself(x: Tensor) -> Tensor:
    return x


# ------------------------------------------------------------------ blocks
def _attention(
    block: nn.Module,
    of_prompts: Callable,
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    keep: int | None,
) -> Callable:
    """The block's attention with its slots, as a function of what it reads. of_prompts: gives their keys and values."""
    slots = block.delta

    def attend(normed: Tensor) -> Tensor:
        mask = slots.mask(attn_mask, normed, slots.layout)
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        if prompts or keep is not None or (is_causal and mask is not None):
            keys_values = [p if isinstance(p, tuple) else of_prompts(block, p) for p in prompts]
            return token.attend(block.attn, normed, keys_values, mask, is_causal, keep, rope)
        return block.attn(normed, rope=rope, attn_mask=mask, is_causal=is_causal)

    return attend


def _scaled(gamma: Tensor | None, update: Tensor) -> Tensor:
    return update if gamma is None else gamma * update


def _block_forward(
    self: EvaBlock,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    keep: int | None = None,
) -> Tensor:
    attend = _attention(self, prompt_keys_values, rope, attn_mask, is_causal, keep)
    branches = (
        Branch("attention", self.norm1, lambda n: _scaled(self.gamma_1, attend(n)), self.drop_path1),
        Branch("mlp", self.norm2, lambda n: _scaled(self.gamma_2, self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def _post_norm_forward(
    self: EvaBlockPostNorm,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    keep: int | None = None,
) -> Tensor:
    attend = _attention(self, _post_norm_keys_values, rope, attn_mask, is_causal, keep)
    branches = (
        Branch("attention", _itself, lambda n: self.norm1(attend(n)), self.drop_path1),
        Branch("mlp", _itself, lambda n: self.norm2(self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def prompt_keys_values(block: EvaBlock, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, key heads, p, head_dim)."""
    return token.prompt_keys_values(block.attn, block.norm1(prompts))


def _post_norm_keys_values(block: EvaBlockPostNorm, prompts: Tensor) -> token.KeysValues:
    return token.prompt_keys_values(block.attn, prompts)


def _parts(block: nn.Module) -> dict[str, Part]:
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp)


def _width(block: nn.Module) -> int:
    return (block.attn.q_proj if block.attn.qkv is None else block.attn.qkv).in_features


def _family(name: str, forward: Callable, keys_values: Callable) -> Family:
    return Family(
        name=f"deltalens.backbones.timm.eva:{name}",
        methods={"forward": forward},
        slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
        parts=_parts,
        width=_width,
        keys_values=keys_values,
        readers=lambda block: {"attention.pre": token.attention_readers(), "mlp.pre": token.mlp_readers()},
        before_merge=token.own_bias_before_fold,
    )


BLOCK = _family("BLOCK", _block_forward, prompt_keys_values)
POST_NORM = _family("POST_NORM", _post_norm_forward, _post_norm_keys_values)


# ------------------------------------------------------------------ the owner of the tokens
def _owner_forward(self: Eva, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    masked = attn_mask is not None or is_causal
    if masked or not token_owner.head_reads_class_row_only(self, Eva, (BLOCK, POST_NORM)):
        return token_owner.whole_forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
    images, (x, rope) = x, self._pos_embed(self.patch_embed(x))
    each_its_own = self.rope_mixed and rope is not None
    x = token_owner.class_row(self, self.norm_pre(x), lambda i: {"rope": rope[i] if each_its_own else rope})
    return token_owner.logits(self, images, self.norm(x))


OWNER = token_owner.owner_family("deltalens.backbones.timm.eva:OWNER", _owner_forward, pool=token_owner.pool)
OTHER_HEAD = Family(
    name="deltalens.backbones.timm.eva:OTHER_HEAD",
    methods={"forward_intermediates": token_owner.forward_intermediates},
)


def block_family(block: nn.Module) -> Family:
    """The family of a block of `timm.models.eva`."""
    if not token.is_softmax(block.attn):
        return UNKNOWN_BLOCK
    known = {EvaBlock.forward: BLOCK, EvaBlockPostNorm.forward: POST_NORM}
    return known.get(original_class(block).forward, UNKNOWN_BLOCK)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every Eva in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, Eva) or not len(owner.blocks):
            continue
        tower = token_owner.new_tower(owner)
        for i, block in enumerate(owner.blocks):
            family = block_family(block)
            tower.add(f"blocks.{i}", block, family, owner.embed_dim, owner.patch_embed.grid_size)
            if family is not UNKNOWN_BLOCK:
                attn = Site(f"blocks.{i}.attn", block.attn, token.ROPE_ATTENTION, owner.embed_dim, tower=tower)
                tower.always.append(attn)
        token_owner.set_owner(tower, owner, OWNER, Eva, OTHER_HEAD)
        yield path, tower
