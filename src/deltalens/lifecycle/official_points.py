"""The names that official repositories give to methods for point clouds.

One function per source: (model, adapter, official state dict) -> (our names and tensors, entries used).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

Import = tuple[dict[str, Tensor], int]

_LEAVES = {"gamma": "scale", "beta": "shift"}
_LAYERS = {"": {"1": "norm1", "2": "norm2"}, "attn.": {"1": "attn.qkv", "2": "attn.proj"}}
_LAYERS["mlp."] = {"1": "mlp.fc1", "2": "mlp.fc2"}
_ADAPTER = {"adapter_layer_norm_before": "norm", "down_proj": "down", "up_proj": "up", "scale": "scale"}


def dapt(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`tfts_gamma_1` (patch tokens), `blocks.blocks.0.Adapter_MLP.up_proj.weight`, `cls_token`, `cls_head_finetune.*`
    (LMD0311/DAPT), also behind "module."."""
    return _named(state_dict, _dapt_name)


def _dapt_name(key: str) -> str | None:
    if match := re.fullmatch(r"(blocks\.blocks\.\d+)\.Adapter_MLP\.(\w+)\.(weight|bias)", key):
        return f"{match[1]}.mlp_parallel.dapt.{_ADAPTER[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(blocks\.blocks\.\d+)\.tfts_(gamma|beta)_3", key):
        return f"{match[1]}.mlp_parallel.dapt.prompt.{match[2]}"
    if match := re.fullmatch(r"(blocks\.blocks\.\d+)\.(|attn\.|mlp\.)tfts_(gamma|beta)_([12])", key):
        return f"{match[1]}.{_LAYERS[match[2]][match[4]]}.all.dapt.{_LEAVES[match[3]]}"
    if match := re.fullmatch(r"tfts_(gamma|beta)_([12])", key):
        return f"{'patches.dapt.tfts' if match[2] == '1' else 'norm.all.dapt'}.{_LEAVES[match[1]]}"
    return _trained_name(key)


def _trained_name(key: str) -> str | None:
    """Class tokens and the head, which have their own names."""
    return key if re.fullmatch(r"cls_(token|pos|head_finetune\..+)", key) else None


def _named(state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> Import:
    pairs = ((rename(key.removeprefix("module.")), tensor) for key, tensor in state_dict.items())
    found = {key: tensor for key, tensor in pairs if key is not None}
    return found, len(found)


SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {"dapt": dapt}
