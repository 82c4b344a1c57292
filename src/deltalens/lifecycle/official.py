"""Load tensors that the methods' official repositories saved, by their own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.lifecycle import official_adapters
from deltalens.lifecycle.state import adapter_of, state_of
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of, head_tensors, load_tensors


def import_official(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str, name: str | None = None
) -> tuple[int, int]:
    """Fill an attached adapter from an official checkpoint's state dict. Returns (tensors loaded, entries ignored).

    source: "mona" (Leiyi-Hu/mona, STAR-MMRotate) or "vpt" (KMnP/vpt: ViT, MAE, MoCo-v3 and Swin, shallow and deep;
    PROJECT is
    applied to the prompts). Attach the same configuration first. Backbone weights in the checkpoint are ignored, as
    they are
    the frozen ones; a checkpoint without a head leaves the head as it is. ValueError for missing or misshapen tensors.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    name, _ = adapter_of(model, name)
    found, used = SOURCES[source](model, name, state_dict)
    kept = {key: tensor.detach().clone() for key, tensor in head_tensors(model, name).items()}
    load_tensors(model, name, {**kept, **found})
    return len(found), len(state_dict) - used


Import = tuple[dict[str, Tensor], int]

_MONA_PLACES = {
    "my_module_1": "attention_stream",
    "mona1": "attention_stream",
    "mona_attn": "attention_stream",
    "my_module_2": "mlp_stream",
    "mona2": "mlp_stream",
    "mona_mlp": "mlp_stream",
}


def _mona(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`[backbone.]layers.0.blocks.0.my_module_1.gamma` -> `layers.0.blocks.0.attention_stream.mona.gamma`; the mmcls
    head `head.fc.*` as it is."""
    found: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(?:backbone\.)?((?:layers|stages)\.\d+\.blocks\.\d+)\.(\w+)\.(.+)", key)
        if match and match[2] in _MONA_PLACES:
            path = re.sub(r"^stages", "layers", match[1])
            found[f"{path}.{_MONA_PLACES[match[2]]}.mona.{match[3]}"] = tensor
    return _with_head(model, name, state_dict, found, len(found), "head.fc.")


def _vpt(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """`enc.[transformer.]prompt_embeddings` (1, p, d) is the first block's prompt, `deep_prompt_embeddings` (L-1, p,
    d), on Swin `deep_prompt_embeddings_0..3`, the following blocks' in order."""
    prefix = next(
        (key.removesuffix("prompt_embeddings") for key in state_dict if re.fullmatch(r"(.+\.)?prompt_embeddings", key)),
        "",
    )
    names = [f"{prefix}prompt_embeddings", f"{prefix}deep_prompt_embeddings"]
    names += [f"{prefix}deep_prompt_embeddings_{stage}" for stage in range(4)]
    present = [key for key in names if key in state_dict]
    if not present:
        raise ValueError("no prompt_embeddings in the state dict: this is no VPT checkpoint")
    rows = [row for key in present for row in state_dict[key]]
    used = len(present)
    if f"{prefix}prompt_proj.weight" in state_dict:
        weight, bias = state_dict[f"{prefix}prompt_proj.weight"], state_dict[f"{prefix}prompt_proj.bias"]
        rows, used = [F.linear(row, weight, bias) for row in rows], used + 2
    anatomy = anatomy_of(model)
    own = [key for key in adapter_tensors(model, name) if key.endswith(".vpt.embedding")]
    order = {f"{anatomy.canonical(block.path)}.": i for i, block in enumerate(anatomy.blocks())}
    own.sort(key=lambda key: next(i for path, i in order.items() if key.startswith(path)))
    if len(rows) < len(own):
        raise ValueError(
            f"the checkpoint prompts {len(rows)} blocks, the adapter {len(own)}: attach VPTConfig(deep=False)"
        )
    if len(rows) > len(own):
        raise ValueError(
            f"the checkpoint prompts {len(rows)} blocks, the adapter {len(own)}: attach VPTConfig(deep=True)"
        )
    return _with_head(model, name, state_dict, dict(zip(own, rows, strict=True)), used, "head.last_layer.")


def _with_head(model, name, state_dict, found: dict[str, Tensor], used: int, official: str) -> Import:
    """Add the official linear head, where both sides have one."""
    heads = list(state_of(model).adapters[name].heads)
    if len(heads) == 1:
        for leaf in ("weight", "bias"):
            if official + leaf in state_dict:
                found[f"{heads[0]}.{leaf}"] = state_dict[official + leaf]
                used += 1
    return found, used


SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {"mona": _mona, "vpt": _vpt}
SOURCES |= official_adapters.SOURCES
