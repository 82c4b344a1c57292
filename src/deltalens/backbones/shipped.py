"""The two small backbones whose weights travel with the package.

Importing this module registers `deltalens_swin_mini` and `deltalens_vit_mini` with timm, after which they are
ordinary timm models: `timm.create_model("deltalens_swin_mini", pretrained=True, num_classes=10)`. They are timm's own
`SwinTransformer` and `VisionTransformer`, pretrained on the 200 classes of Tiny ImageNet at 48 px: see
`weights/README.md`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import swin_transformer, vision_transformer
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


def weights_file(model_name: str) -> Path:
    """The packaged weights of a shipped model: `deltalens_swin_mini` -> `weights/swin-mini.safetensors`."""
    return WEIGHTS / (model_name.removeprefix("deltalens_").replace("_", "-") + ".safetensors")


def _cfg(model_name: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "file": str(weights_file(model_name)),
        "num_classes": 200,
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "license": "other",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "deltalens_swin_mini": _cfg(
            "deltalens_swin_mini",
            input_size=(3, 64, 64),
            first_conv="patch_embed.proj",
            classifier="head.fc",
        ),
        "deltalens_vit_mini": _cfg(
            "deltalens_vit_mini",
            input_size=(3, 48, 48),
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    }
)


def _in_float32(state_dict: dict[str, torch.Tensor], model: nn.Module, filter_fn) -> dict[str, torch.Tensor]:
    """timm's checkpoint filter, which interpolates tables and position embeddings, on float32 copies."""
    return filter_fn({name: tensor.float() for name, tensor in state_dict.items()}, model)


@register_model
def deltalens_swin_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Swin with embed dim 40 and windows of 4, four stages (strides 4 to 32), native input 64 px."""
    config = {
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 40,
        "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 8, 16),
        "drop_path_rate": 0.0,
        **kwargs,
    }
    out_indices = config.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        swin_transformer.SwinTransformer,
        "deltalens_swin_mini",
        pretrained,
        pretrained_filter_fn=partial(_in_float32, filter_fn=swin_transformer.checkpoint_filter_fn),
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **config,
    )


@register_model
def deltalens_vit_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT with embed dim 192, six blocks, patches of 8 and a class token, native input 48 px."""
    config = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 6, **kwargs}
    out_indices = config.pop("out_indices", 3)
    return build_model_with_cfg(
        vision_transformer.VisionTransformer,
        "deltalens_vit_mini",
        pretrained,
        pretrained_filter_fn=partial(_in_float32, filter_fn=vision_transformer.checkpoint_filter_fn),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **config,
    )
