"""Tiny convolutional and hybrid networks with random weights, one for each family of timm that works on maps."""

from __future__ import annotations

from functools import partial

from models import CLASSES, randomize
from timm.layers import GroupNorm1, GroupNormAct
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.fastvit import FastVit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, Pooling, SepConv
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn


def _sized(model: nn.Module, size: int) -> nn.Module:
    model.pretrained_cfg = {"input_size": (3, size, size)}
    return randomize(model).eval()


def resnet(**kwargs) -> nn.Module:
    """4 stages of basic blocks, 8 to 20 channels."""
    settings = {"block": BasicBlock, "layers": (2, 1, 2, 1), "channels": (8, 12, 16, 20), "num_classes": CLASSES}
    return _sized(ResNet(**{**settings, **kwargs}), 64)


def resnext(**kwargs) -> nn.Module:
    """Grouped bottlenecks with squeeze and excitation, a deep stem, average pooling in the shortcuts."""
    settings = {"block": Bottleneck, "layers": (1, 2, 1, 1), "channels": (4, 4, 8, 8), "cardinality": 2,
                "base_width": 64, "block_args": {"attn_layer": "se"}, "stem_type": "deep", "stem_width": 4,
                "avg_down": True}  # fmt: skip
    return resnet(**{**settings, **kwargs})


def regnet(**kwargs) -> nn.Module:
    """4 stages of RegNet-Y blocks, 8 to 24 channels."""
    settings = {"depth": 5, "w0": 8, "wa": 8.0, "wm": 1.5, "group_size": 4, "se_ratio": 0.25}
    return _sized(RegNet(RegNetCfg(**{**settings, **kwargs}), num_classes=CLASSES), 64)


def resnetv2(**kwargs) -> nn.Module:
    """2 stages of pre-activation bottlenecks, 16 and 32 channels, GroupNorm and standardised weights."""
    settings = {"layers": (2, 2), "channels": (16, 32), "stem_chs": 8, "num_classes": CLASSES,
                "norm_layer": partial(GroupNormAct, num_groups=4)}  # fmt: skip
    return _sized(ResNetV2(**{**settings, **kwargs}), 64)


MOBILE = [
    ["ds_r2_k3_s1_e1_c8_se0.25"],
    ["ir_r2_k3_s2_e2_c12_se0.25"],
    ["er_r2_k3_s2_e2_c16"],
    ["uir_r2_a3_k3_s2_e2_c16"],
    ["cn_r1_k1_s1_c20"],
]
HYBRID = [
    ["er_r1_k3_s2_e2_c16"],
    ["uir_r1_a3_k3_s1_e2_c16", "mqa_r1_k3_h2_s1_d8_c16", "mqa_r1_k3_h2_s1_v2_d8_c16", "mha_r1_k3_h2_s1_d8_c16"],
    ["cn_r1_k1_s1_c20"],
]


def efficientnet(stages: list = MOBILE, **kwargs) -> nn.Module:
    """Depthwise-separable, inverted, fused and universal blocks, 8 to 20 channels."""
    settings = {"stem_size": 8, "num_features": 24, "num_classes": CLASSES, "fix_stem": True}
    return _sized(EfficientNet(decode_arch_def(stages), **{**settings, **kwargs}), 64)


def mobile_hybrid(**kwargs) -> nn.Module:
    """MobileNet v4 with multi-query attention, also on downsampled keys, and multi-head attention."""
    settings = {"stem_size": 8, "num_features": 24, "num_classes": CLASSES, "fix_stem": True}
    return _sized(MobileNetV3(decode_arch_def(HYBRID), **{**settings, "layer_scale_init_value": 0.5, **kwargs}), 64)


_METAFORMER = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "layer_scale_init_values": 0.5, "use_mlp_head": False,
               "num_classes": CLASSES}  # fmt: skip


def caformer(**kwargs) -> nn.Module:
    """Two stages of separable convolutions, two of attention on tokens, with ResScale and LayerScale."""
    settings = {"token_mixers": (SepConv, SepConv, Attention, Attention), "head_dim": 8,
                "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2}  # fmt: skip
    return _sized(MetaFormer(**{**_METAFORMER, **settings, **kwargs}), 64)


def poolformer(**kwargs) -> nn.Module:
    """Four stages of pooling on maps."""
    settings = {"token_mixers": Pooling, "norm_layers": GroupNorm1, "res_scale_init_values": None, "mlp_act": nn.GELU,
                "mlp_bias": True}  # fmt: skip
    return _sized(MetaFormer(**{**_METAFORMER, **settings, **kwargs}), 64)


def maxvit(blocks=("M", "M"), conv: dict | None = None, **transformer) -> nn.Module:
    """Two stages of two blocks, 16 and 32 channels, windows and grids of 2 x 2; "C", "T" and "PM" are other blocks."""
    settings = {"dim_head": 8, "rel_pos_type": "bias", "partition_ratio": 16, "head_first": False, "init_values": 0.5}
    config = MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(2, 2),
        block_type=tuple(blocks),
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(**{"expand_ratio": 2.0, **(conv or {})}),
        transformer_cfg=MaxxVitTransformerCfg(**{**settings, **transformer}),
    )
    return _sized(MaxxVit(config, img_size=32, num_classes=CLASSES), 32)


def coatnet(**kwargs) -> nn.Module:
    """A stage of convolutions and one of attention over the whole map, two blocks each."""
    return maxvit(("C", "T"), **kwargs)


def maxxvit(**kwargs) -> nn.Module:
    """As `maxvit`, with ConvNeXt blocks."""
    return maxvit(conv={"block_type": "convnext", "init_values": 0.5}, **kwargs)


def fastvit(**kwargs) -> nn.Module:
    """Three stages of RepMixer, one of attention, 8 to 32 channels."""
    settings = {
        "layers": (1, 1, 2, 2),
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
        "embed_dims": (8, 16, 16, 32),
        "mlp_ratios": (2, 2, 2, 2),
        "downsamples": (False, True, True, True),
        "layer_scale_init_value": 0.5,
        "num_classes": CLASSES,
    }
    return _sized(FastVit(**{**settings, **kwargs}), 64)
