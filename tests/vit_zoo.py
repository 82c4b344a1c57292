"""Tiny token networks of timm with random weights: every kind of block, and the plain forms of their attention."""

from __future__ import annotations

import torch
from models import CLASSES, randomize, tiny_vit
from timm.layers import Attention, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": CLASSES}


def tiny(cls: type, **kwargs) -> nn.Module:
    """3 blocks, 24 channels, 3 heads, 4x4 patches of 8 px."""
    return randomize(cls(**{**SETTINGS, **kwargs})).eval()


def swiglu_with_norm(*args, norm_layer=None, **kwargs) -> SwiGLU:
    return SwiGLU(*args, **kwargs, norm_layer=nn.LayerNorm)


VITS = {
    "res-post": lambda **kw: tiny_vit(block_fn=ResPostBlock, **kw),
    "res-post, qk-norm, average": lambda **kw: tiny_vit(
        block_fn=ResPostBlock, qk_norm=True, class_token=False, global_pool="avg", **kw
    ),
    "parallel": lambda **kw: tiny_vit(block_fn=ParallelScalingBlock, init_values=0.3, **kw),
    "parallel, no bias, qk-norm": lambda **kw: tiny_vit(
        block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True, **kw
    ),
    "parallel, fused": lambda **kw: tiny_vit(block_fn=_fused_scaling, **kw),
    "parallel, differential": lambda **kw: tiny_vit(block_fn=DiffParallelScalingBlock, num_heads=2, qk_norm=True, **kw),
    "two of each": lambda **kw: tiny_vit(block_fn=ParallelThingsBlock, init_values=0.3, **kw),
    "differential": lambda **kw: tiny_vit(attn_layer="diff", num_heads=2, qk_norm=True, **kw),
    "registers without class token": lambda **kw: tiny_vit(reg_tokens=2, class_token=False, global_pool="avg", **kw),
    "scale norms, gate": lambda **kw: tiny_vit(scale_attn_norm=True, scale_mlp_norm=True, attn_layer=_gated, **kw),
    "SwiGLU, map pool": lambda **kw: tiny_vit(
        mlp_layer=swiglu_with_norm, class_token=False, global_pool="map", no_embed_class=True, **kw
    ),
    "packed SwiGLU, CLIP": lambda **kw: tiny_vit(mlp_layer=SwiGLUPacked, pre_norm=True, init_values=0.3, **kw),
}
EVAS = {
    "eva": lambda **kw: tiny(Eva, global_pool="token", **kw),
    "eva, average": lambda **kw: tiny(Eva, init_values=0.3, **kw),
    "eva-02": lambda **kw: tiny(
        Eva, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(3, 3), qkv_fused=False, **kw
    ),
    "eva-02 small": lambda **kw: tiny(Eva, swiglu_mlp=True, use_rot_pos_emb=True, global_pool="token", **kw),
    "post-norm": lambda **kw: tiny(Eva, use_post_norm=True, use_rot_pos_emb=True, global_pool="token", **kw),
    "dinov3": lambda **kw: tiny(
        Eva,
        num_reg_tokens=2,
        no_embed_class=True,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        attn_type="rope",
        init_values=0.3,
        dynamic_img_size=True,
        **{"num_heads": 3, "global_pool": "token", **kw},
    ),
    "perception encoder": lambda **kw: tiny(
        Eva,
        attn_type="rope",
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        use_pre_transformer_norm=True,
        use_fc_norm=False,
        global_pool="map",
        attn_pool_num_heads=3,
        attn_pool_mlp_ratio=2.0,
        class_token=False,
        **kw,
    ),
    "mixed, no class token": lambda **kw: tiny(
        Eva, use_rot_pos_emb=True, rope_type="mixed", class_token=False, global_pool="avg", **kw
    ),
    "grouped queries, gate, qk-norm": lambda **kw: tiny(
        Eva,
        attn_type="rope",
        qkv_fused=False,
        qk_norm=True,
        num_kv_heads=1,
        use_rot_pos_emb=True,
        attn_only_layer_scale=True,
        init_values=0.3,
        global_pool="token",
        **kw,
    ),
}
BEITS = {
    "beit": lambda **kw: tiny(Beit, use_rel_pos_bias=True, init_values=0.3, **kw),
    "beit, class token": lambda **kw: tiny(
        Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, global_pool="token", swiglu_mlp=True, scale_mlp=True, **kw
    ),
    "beit, shared": lambda **kw: tiny(Beit, use_shared_rel_pos_bias=True, use_rel_pos_bias=True, **kw),
    "beit, no bias": lambda **kw: tiny(Beit, qkv_bias=False, global_pool="token", **kw),
}
RELPOS = {
    "relpos": lambda **kw: tiny(VisionTransformerRelPos, rel_pos_dim=8, init_values=0.3, qk_norm=True, **kw),
    "relpos, class token, table": lambda **kw: tiny(
        VisionTransformerRelPos, rel_pos_type="bias", class_token=True, global_pool="token", **kw
    ),
    "relpos, shared": lambda **kw: tiny(
        VisionTransformerRelPos, rel_pos_type="bias", class_token=True, shared_rel_pos=True, fc_norm=True, **kw
    ),
    "relpos, res-post": lambda **kw: tiny(VisionTransformerRelPos, block_fn=ResPostRelPosBlock, rel_pos_dim=8, **kw),
}
SAMS = {
    "sam": lambda **kw: tiny(
        VisionTransformerSAM, window_size=3, global_attn_indexes=(1,), use_rel_pos=True, neck_chans=12, **kw
    ),
    "sam, rope": lambda **kw: tiny(
        VisionTransformerSAM,
        window_size=2,
        global_attn_indexes=(2,),
        use_rope=True,
        neck_chans=0,
        init_values=0.3,
        qk_norm=True,
        **{"num_heads": 3, **kw},
    ),
}


def tiny_distilled(**kwargs) -> nn.Module:
    return tiny(VisionTransformerDistilled, **kwargs)


def _fused_scaling(*args, **kwargs):
    return ParallelScalingBlock(*args, **kwargs, fuse_out_proj=True)


class _gated(Attention):
    """timm's attention with its gate."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, gated=True)


# ------------------------------------------------------------------ plain forms
def bias_of(block: nn.Module, shared):
    """The relative position bias of a block of Beit or VisionTransformerRelPos, None where it has none; the block's own
    part is taken out of it, so that the bias can be handed in."""
    attn = block.attn
    if getattr(attn, "relative_position_bias_table", None) is not None:
        own = attn._get_rel_pos_bias()
        shared = own if shared is None else own + shared
    if getattr(attn, "rel_pos", None) is not None:
        shared = attn.rel_pos.get_bias()
    return shared


def with_tokens(model: nn.Module, prompts: list[torch.Tensor], deep: bool) -> nn.Module:
    """A plain network whose blocks really carry prompts (p, C) as tokens behind the prefix: new ones in every block, or
    those of the first block throughout. Nothing of the library under test is used."""
    prefix, last = model.num_prefix_tokens, len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        block.forward = _carrying(block, block.forward, prompts[i if deep else 0], prefix, deep or i == 0,
                                  deep or i == last)  # fmt: skip
    return model


def _carrying(block, own, prompts, prefix, enter, leave):
    count = len(prompts)

    def forward(x, **settings):
        if enter:
            x = torch.cat([x[:, :prefix], prompts.expand(len(x), -1, -1), x[:, prefix:]], 1)
        name = next((key for key in settings if key.startswith("shared_rel_pos")), None)
        if hasattr(block, "attn") and hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens = prefix + count
        if name and (bias := bias_of(block, settings[name])) is not None:
            where = torch.tensor([*range(prefix), *range(prefix + count, x.shape[1])])
            wide = bias.new_zeros(*bias.shape[:2], x.shape[1], x.shape[1])
            wide[:, :, where[:, None], where] = bias
            block.attn.relative_position_bias_table = block.attn.rel_pos = None
            settings[name] = wide
        y = own(x, **settings)
        return torch.cat([y[:, :prefix], y[:, prefix + count :]], 1) if leave else y

    return forward
