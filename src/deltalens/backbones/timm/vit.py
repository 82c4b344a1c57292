"""timm's VisionTransformer: class token, registers or neither, LayerScale, qk-norm, gates, differential attention.

====================  ==================================================================================
block                 what differs
====================  ==================================================================================
`Block`               pre-norm; with `DiffAttention` attention maps cannot be drawn, all else is the same
`ResPostBlock`        post-norm: x + norm(attn(x)). What a branch reads, n, is x itself
`ParallelThingsBlock` sum of several attentions, then sum of several MLPs, each with a norm of its own: n is x. The
                      drop paths of a sum act before `inner` modules. Parts are q1, k1, v1, proj1, q2, ..., fc1_1, ...
====================  ==================================================================================

`ParallelScalingBlock` and `DiffParallelScalingBlock` are in `vit_parallel.py`. DeiT, the hybrids with a ResNet as
patch embedding and everything else built on `VisionTransformer` belong here too. A distilled DeiT has two heads, which
read the two prefix tokens: it offers neither `pool` nor `output`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.backbones.timm.vit_parallel import DIFF_SCALING, FUSED_SCALING, SCALING
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.swap import original_class

_SLOTS = RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"}


def _itself(x: Tensor) -> Tensor:
    return x


# ------------------------------------------------------------------ one attention, one MLP
def _attention(
    block: Block | ResPostBlock, of_prompts: Callable, attn_mask: Tensor | None, is_causal: bool, keep: int | None
) -> Callable:
    """The block's attention with its slots, as a function of what it reads. of_prompts: gives their keys and values."""
    slots = block.delta

    def attend(normed: Tensor) -> Tensor:
        mask = slots.mask(attn_mask, normed, slots.layout)
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        if prompts or keep is not None or (is_causal and mask is not None):
            keys_values = [p if isinstance(p, tuple) else of_prompts(block, p) for p in prompts]
            return token.attend(block.attn, normed, keys_values, mask, is_causal, keep)
        masks = {} if mask is None else {"attn_mask": mask}
        return block.attn(normed, **masks, **({"is_causal": True} if is_causal else {}))

    return attend


def _block_forward(
    self: Block, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, keep: int | None = None
) -> Tensor:
    attend = _attention(self, prompt_keys_values, attn_mask, is_causal, keep)
    branches = (
        Branch("attention", self.norm1, lambda n: self.ls1(attend(n)), self.drop_path1),
        Branch("mlp", self.norm2, lambda n: self.ls2(self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def _res_post_forward(
    self: ResPostBlock, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, keep: int | None = None
) -> Tensor:
    attend = _attention(self, _res_post_keys_values, attn_mask, is_causal, keep)
    branches = (
        Branch("attention", _itself, lambda n: self.norm1(attend(n)), self.drop_path1),
        Branch("mlp", _itself, lambda n: self.norm2(self.mlp(n)), self.drop_path2),
    )
    return token_owner.leave(self.delta, residual_block(self.delta, self.delta.layout, x, branches, keep), keep)


def prompt_keys_values(block: Block, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return token.prompt_keys_values(block.attn, block.norm1(prompts))


def _res_post_keys_values(block: ResPostBlock, prompts: Tensor) -> token.KeysValues:
    return token.prompt_keys_values(block.attn, prompts)


def _parts(block: Block) -> dict[str, Part]:
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp)


def _width(block: Block) -> int:
    return block.attn.qkv.in_features


def _readers(block: Block) -> dict[str, tuple[str, ...]]:
    return {"attention.pre": token.attention_readers(), "mlp.pre": token.mlp_readers()}


def _block_family(name: str, forward: Callable, keys_values: Callable) -> Family:
    return Family(
        name=f"deltalens.backbones.timm.vit:{name}",
        methods={"forward": forward},
        slots=_SLOTS,
        parts=_parts,
        width=_width,
        keys_values=keys_values,
        readers=_readers,
    )


BLOCK = _block_family("BLOCK", _block_forward, prompt_keys_values)
DIFF_BLOCK = _block_family("DIFF_BLOCK", _block_forward, prompt_keys_values)
RES_POST = _block_family("RES_POST", _res_post_forward, _res_post_keys_values)


# ------------------------------------------------------------------ several attentions, several MLPs
def _things_forward(
    self: ParallelThingsBlock,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    keep: int | None = None,
) -> Tensor:
    slots = self.delta

    def attend(tokens: Tensor) -> Tensor:
        mask = slots.mask(attn_mask, tokens, slots.layout)
        prompts = [module(tokens) for module in slots.live("attention.prompts")]
        keys_values = [p if isinstance(p, tuple) else _things_keys_values(self, p) for p in prompts]
        outputs = []
        for i, branch in enumerate(self.attns):
            own = [tuple(each.chunk(len(self.attns), 1)[i] for each in pair) for pair in keys_values]
            if own or keep is not None or (is_causal and mask is not None):
                update = token.attend(branch.attn, branch.norm(tokens), own, mask, is_causal, keep)
            else:
                update = branch.attn(branch.norm(tokens), attn_mask=mask, is_causal=is_causal)
            outputs.append(branch.drop_path(branch.ls(update)))
        return torch.stack(outputs).sum(0)

    branches = (
        Branch("attention", _itself, attend, _itself),
        Branch("mlp", _itself, lambda n: torch.stack([ffn(n) for ffn in self.ffns]).sum(0), _itself),
    )
    return token_owner.leave(slots, residual_block(slots, slots.layout, x, branches, keep), keep)


def _things_keys_values(block: ParallelThingsBlock, prompts: Tensor) -> token.KeysValues:
    """Those of all attentions, one after the other on the axis of the heads."""
    pairs = [token.prompt_keys_values(branch.attn, branch.norm(prompts)) for branch in block.attns]
    return tuple(torch.cat(each, 1) for each in zip(*pairs, strict=True))


def _things_parts(block: ParallelThingsBlock) -> dict[str, Part]:
    parts = {}
    for i, (attns, ffns) in enumerate(zip(block.attns, block.ffns, strict=True)):
        attention = token.attention_parts(attns.attn, f"attns.{i}.attn")
        parts |= {f"{name}{i + 1}": part for name, part in attention.items()}
        parts |= {f"{name}_{i + 1}": part for name, part in token.mlp_parts(ffns.mlp, f"ffns.{i}.mlp").items()}
    return parts


THINGS = Family(
    name="deltalens.backbones.timm.vit:THINGS",
    methods={"forward": _things_forward},
    slots=_SLOTS,
    parts=_things_parts,
    width=lambda block: block.attns[0].attn.qkv.in_features,
    keys_values=_things_keys_values,
)


# ------------------------------------------------------------------ the owner of the tokens
_KEEPING = (BLOCK, DIFF_BLOCK, RES_POST, THINGS, SCALING, FUSED_SCALING, DIFF_SCALING)


def _first_rows(self: VisionTransformer, x: Tensor, rows: int) -> Tensor:
    """The first normed tokens of an image, where the head reads no others."""
    x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
    for block in self.blocks[:-1]:
        x = checkpoint(block, x) if self.grad_checkpointing else block(x)
    last = self.blocks[-1]
    return self.norm(checkpoint(last, x, keep=rows) if self.grad_checkpointing else last(x, keep=rows))


def _owner_forward(self: VisionTransformer, x: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
    masks = {} if attn_mask is None else {"attn_mask": attn_mask}
    if masks or kwargs or not token_owner.head_reads_class_row_only(self, VisionTransformer, _KEEPING):
        return token_owner.whole_forward(self, x, **masks, **kwargs)
    return token_owner.logits(self, x, _first_rows(self, x, 1))


def _distilled_forward(self: VisionTransformerDistilled, x: Tensor, attn_mask: Tensor | None = None, **kwargs):
    masks = {} if attn_mask is None else {"attn_mask": attn_mask}
    if masks or kwargs or not token_owner.head_reads_class_row_only(self, VisionTransformerDistilled, _KEEPING):
        return token_owner.whole_forward(self, x, **masks, **kwargs)
    return self.forward_head(_first_rows(self, x, 2))


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
    *args,
    **kwargs,
):
    """timm's method; tokens that adapters added to the stream never leave it."""
    kwargs |= dict(zip(("attn_mask", "is_causal"), args, strict=False))
    settings = (indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
    if not output_dict:
        return token_owner.forward_intermediates(self, x, *settings, **kwargs)
    final, maps, prefixes = token_owner.intermediates(self, x, *settings, **kwargs)
    found = {"image_intermediates": maps}
    if return_prefix_tokens and self.num_prefix_tokens:
        found["image_intermediates_prefix"] = prefixes
    return found if intermediates_only else {**found, "image_features": final}


OWNER = token_owner.owner_family(
    "deltalens.backbones.timm.vit:OWNER",
    _owner_forward,
    pool=token_owner.pool,
    forward_intermediates=_forward_intermediates,
)
DISTILLED = Family(
    name="deltalens.backbones.timm.vit:DISTILLED",
    methods={"forward": _distilled_forward, "forward_intermediates": _forward_intermediates},
)
OTHER_HEAD = Family(
    name="deltalens.backbones.timm.vit:OTHER_HEAD", methods={"forward_intermediates": _forward_intermediates}
)


# ------------------------------------------------------------------ which block is which
def _family(block: nn.Module) -> Family:
    forward = original_class(block).forward
    if forward is Block.forward and token.is_softmax(block.attn):
        return BLOCK
    if forward is Block.forward and token.is_differential(block.attn):
        return DIFF_BLOCK
    if forward is ResPostBlock.forward and (token.is_softmax(block.attn) or token.is_differential(block.attn)):
        return RES_POST
    if forward is ParallelThingsBlock.forward:
        known = [token.is_softmax(branch.attn) or token.is_differential(branch.attn) for branch in block.attns]
        return THINGS if all(known) else UNKNOWN_BLOCK
    if forward is ParallelScalingBlock.forward:
        return SCALING if block.out_proj is None else FUSED_SCALING
    return DIFF_SCALING if forward is DiffParallelScalingBlock.forward else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every VisionTransformer in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, VisionTransformer) or not len(owner.blocks):
            continue
        tower = token_owner.new_tower(owner)
        grid = getattr(owner.patch_embed, "grid_size", None)
        for i, block in enumerate(owner.blocks):
            tower.add(f"blocks.{i}", block, _family(block), owner.embed_dim, grid)
        if isinstance(owner, VisionTransformerDistilled):
            token_owner.set_owner(tower, owner, DISTILLED, VisionTransformerDistilled, OTHER_HEAD)
            tower.classifier = None
        else:
            token_owner.set_owner(tower, owner, OWNER, VisionTransformer, OTHER_HEAD)
        yield path, tower
