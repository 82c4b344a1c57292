"""The names that official repositories give to methods for point clouds.

One function per source: (model, adapter, official state dict) -> (our names and tensors, entries used).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from deltalens.lifecycle.tensors import adapter_tensors

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


def idpt(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`blocks.cls.conv1.0.weight` (C, 2 C, 1, 1) and its norm `.1`, `conv5` for the last layer, `prompt_pos`,
    `cls_token`, `cls_head_finetune.*` (zyh16143998882/ICCV23-IDPT). The norms are there a second time, as `bn1`..."""
    own = next((key for key in adapter_tensors(model, name) if key.endswith(".idpt.mix.weight")), None)
    if own is None:
        raise ValueError("the adapter has no IDPT: attach IDPTConfig first")
    return _named(state_dict, lambda key: _idpt_name(key, own.removesuffix("mix.weight")))


def _idpt_name(key: str, place: str) -> str | None:
    if match := re.fullmatch(r"blocks\.cls\.conv(\d)\.([01])\.(\w+)", key):
        number, part, leaf = match.groups()
        path = "" if number == "5" else f"edges.{int(number) - 1}."
        layer = {"0": "mix." if number == "5" else "", "1": "norm."}[part]
        return f"{place}{path}{layer}{leaf}"
    return f"{place}position" if key == "prompt_pos" else _trained_name(key)


def _trained_name(key: str) -> str | None:
    """Class tokens and the head, which have their own names."""
    return key if re.fullmatch(r"cls_(token|pos|head_finetune\..+)", key) else None


def _named(state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> Import:
    """Convolutions of width 1 become matrices."""
    pairs = ((rename(key.removeprefix("module.")), tensor) for key, tensor in state_dict.items())
    found = {key: tensor.flatten(1) if _is_convolution(key, tensor) else tensor for key, tensor in pairs if key}
    return found, len(found)


def _is_convolution(key: str, tensor: Tensor) -> bool:
    return key.endswith("weight") and tensor.dim() > 2 and tensor.shape[2:].numel() == 1


SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {"dapt": dapt, "idpt": idpt}
