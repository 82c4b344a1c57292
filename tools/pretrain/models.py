"""The shipped models by their short names, built so that they take any image size while training."""

import timm
from torch import nn

import deltalens.backbones.shipped as shipped

ANY_SIZE = {"swin-mini": {"strict_img_size": False}, "vit-mini": {"dynamic_img_size": True}}


def timm_name(short_name: str) -> str:
    return "deltalens_" + short_name.replace("-", "_")


def native_size(short_name: str) -> int:
    return shipped.default_cfgs[timm_name(short_name)].default.input_size[-1]


def create(short_name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """A new model with random weights."""
    return timm.create_model(
        timm_name(short_name),
        img_size=native_size(short_name),
        drop_path_rate=drop_path_rate,
        **ANY_SIZE[short_name],
    )
