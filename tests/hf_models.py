"""Tiny transformers models with random weights: 3 blocks, 24 channels, patches of 8 px, images of 32 px."""

from __future__ import annotations

import transformers
from models import CLASSES, randomize
from torch import nn

_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
_CONV = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": CLASSES}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "num_labels": CLASSES,
}
_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
# prefix of the configuration's class -> its settings
SETTINGS = {
    "ViT": _VIT,
    "DeiT": _VIT,
    "Dinov2": {**_VIT, "mlp_ratio": 2, "layerscale_value": 0.5},
    "Dinov2WithRegisters": {**_VIT, "mlp_ratio": 2, "layerscale_value": 0.5, "num_register_tokens": 2},
    "DINOv3ViT": {**_VIT, "num_register_tokens": 2, "layerscale_value": 0.5},
    "Beit": {**_VIT, "use_relative_position_bias": True, "use_mask_token": True, "layer_scale_init_value": 0.1},
    "ConvNext": _CONV,
    "ConvNextV2": _CONV,
    "DINOv3ConvNext": _CONV,
    "Swin": _SWIN,
    "Swinv2": _SWIN,
}


def config_of(prefix: str, **settings):
    """A configuration, of a two-tower model for CLIP and its relatives."""
    if prefix not in ("CLIP", "Siglip", "Siglip2"):
        return getattr(transformers, f"{prefix}Config")(**{**SETTINGS[prefix], **settings})
    vision = {key: value for key, value in _VIT.items() if key != "num_labels"} | settings
    if prefix == "Siglip2":
        vision |= {"num_patches": 16}
    text = {**_TEXT, "projection_size": 24, "max_position_embeddings": 12}
    return getattr(transformers, f"{prefix}Config")(vision_config=vision, text_config=text, num_labels=CLASSES)


def tiny(name: str, **settings) -> nn.Module:
    """A model by the name of its class, such as "ViTForImageClassification"."""
    cls = getattr(transformers, name)
    prefix = max((p for p in [*SETTINGS, "CLIP", "Siglip", "Siglip2"] if name.startswith(p)), key=len)
    config = config_of(prefix, **settings)
    config = config if isinstance(config, cls.config_class) else config.vision_config
    return randomize(cls(config)).eval()
