"""The names that official repositories give to adapters, AdaptFormer, LoRand, side networks and MLP heads.

One function per source: (model, adapter, official state dict) -> (our names and tensors, entries used).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import state_of

Import = tuple[dict[str, Tensor], int]
_BLOCK = r"(?:backbone\.)?(?:layers|stages)\.(\d+)\.blocks\.(\d+)"
_SIDES = {"project1": "down", "project2": "up", "adapter_downsample": "down", "adapter_upsample": "up"}


def mona_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`layers.0.blocks.0.my_module_1.project1.weight` (Leiyi-Hu/mona), `adapter1` (STAR-MMRotate) -> `attention.inner`;
    `my_module_2`, `adapter2` -> `mlp.inner`."""
    places = {"1": "attention_inner", "2": "mlp_inner"}
    found = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(rf"{_BLOCK}\.(?:my_module_|adapter)([12])\.(project[12])\.(weight|bias)", key)
        if match:
            stage, block, place, side, leaf = match.groups()
            found[f"layers.{stage}.blocks.{block}.{places[place]}.adapter.{_SIDES[side]}.{leaf}"] = tensor
    return _with_head(model, name, state_dict, found, len(found), "head.fc.")


def mona_adaptformer(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`layers.0.blocks.0.my_module_1.project1.weight` (Leiyi-Hu/mona), `adapter` (STAR-MMRotate) -> `mlp.parallel`."""
    found = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(rf"{_BLOCK}\.(?:my_module_1|adapter)\.(project[12])\.(weight|bias)", key)
        if match:
            stage, block, side, leaf = match.groups()
            found[f"layers.{stage}.blocks.{block}.mlp_parallel.adaptformer.{_SIDES[side]}.{leaf}"] = tensor
    return _with_head(model, name, state_dict, found, len(found), "head.fc.")


def mona_lorand(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`stages.0.blocks.0.lorand1.project1.param_dict.A0` (STAR-MMRotate): the branches' factors, which ours stacks."""
    places = {"1": "attention_inner", "2": "mlp_inner"}
    found: dict[str, Tensor] = {}
    factors: dict[str, dict[int, Tensor]] = {}
    used = 0
    for key, tensor in state_dict.items():
        match = re.fullmatch(rf"{_BLOCK}\.lorand([12])\.(project[12])\.(?:(bias)|param_dict\.([AgB])(\d+))", key)
        if match is None:
            continue
        stage, block, place, side, bias, factor, branch = match.groups()
        path = f"layers.{stage}.blocks.{block}.{places[place]}.lorand.{side}"
        used += 1
        if bias:
            found[f"{path}.bias"] = tensor
        else:
            factors.setdefault(f"{path}.{factor}", {})[int(branch)] = tensor
    found |= {key: torch.stack([branches[i] for i in sorted(branches)]) for key, branches in factors.items()}
    return _with_head(model, name, state_dict, found, used, "head.fc.")


def vpt_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`enc.transformer.encoder.layer.0.adapter_downsample.bias`, for MAE and MoCo-v3 `enc.blocks.0` -> `mlp.inner`."""
    found = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(?:.+\.)?(?:layer|blocks)\.(\d+)\.(adapter_(?:down|up)sample)\.(weight|bias)", key)
        if match:
            block, side, leaf = match.groups()
            found[f"blocks.{block}.mlp_inner.adapter.{_SIDES[side]}.{leaf}"] = tensor
    return _with_head(model, name, state_dict, found, len(found), "head.last_layer.")


def vpt_side(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`side_alpha`, `side.features.0.weight`, `side_projection.weight`."""
    found = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"side(?:_(alpha|projection\.weight)|\.(features\.\d+\.(?:weight|bias)))", key)
        if match:
            found[f"output.sidetune.{match[1] or match[2]}"] = tensor
    return _with_head(model, name, state_dict, found, len(found), "head.last_layer.")


def vpt_mlp(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`head.projection.0.weight` and `head.last_layer.weight`, of TRANSFER_TYPE linear with MLP_NUM = layers - 1."""
    (path,) = list(state_of(model).adapters[name].heads)
    official = re.compile(r"head\.((?:projection\.\d+|last_layer)\.\w+)")
    found = {f"{path}.{match[1]}": state_dict[key] for key in state_dict if (match := official.fullmatch(key))}
    return found, len(found)


def _with_head(model, name, state_dict, found: dict[str, Tensor], used: int, official: str) -> Import:
    """Add the official linear head, where both sides have one."""
    heads = list(state_of(model).adapters[name].heads)
    if len(heads) == 1:
        for leaf in ("weight", "bias"):
            if official + leaf in state_dict:
                found[f"{heads[0]}.{leaf}"] = state_dict[official + leaf]
                used += 1
    return found, used


SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {
    "mona_adapter": mona_adapter,
    "mona_adaptformer": mona_adaptformer,
    "mona_lorand": mona_lorand,
    "vpt_adapter": vpt_adapter,
    "vpt_side": vpt_side,
    "vpt_mlp": vpt_mlp,
}
