"""Load tensors that the methods' official repositories saved, by their own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.lifecycle import official_adapters, official_clip, official_points
from deltalens.lifecycle.state import adapter_of, state_of
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of, head_tensors, load_tensors
from deltalens.methods.base import Method


def import_official(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str, name: str | None = None
) -> tuple[int, int]:
    """Fill an attached adapter from an official checkpoint's state dict. Returns (tensors loaded, entries ignored).

    source: "mona" (Leiyi-Hu/mona, STAR-MMRotate) or "vpt" (KMnP/vpt: ViT, MAE, MoCo-v3 and Swin, all locations and
    depths; PROJECT is loaded as such, or applied to the prompts where the configuration has none); of the baselines
    "mona_adapter", "mona_adaptformer" and "mona_lorand" (Leiyi-Hu/mona, STAR-MMRotate), "vpt_adapter", "vpt_side" and
    "vpt_mlp" (KMnP/vpt); beside a CLIP "mma" (Multi-Modal-Adapter), "coop", "cocoop", "kgcoop", "prograd",
    "maple", "rpo", "lasp", "clip_adapter" and "tip_adapter"; on point clouds "dapt" and
    "idpt".
    Attach the same configuration first. Backbone weights and embeddings of class names in the checkpoint are ignored,
    as they are the frozen ones; a checkpoint without a head leaves the head as it is. ValueError for missing or
    misshapen tensors.
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
    """KMnP/vpt's names, `enc.` and `transformer.` being optional:

    * `prompt_embeddings` (1, p, d) is the first block's prompt, `deep_prompt_embeddings` (L-1, p, d), on Swin
      `deep_prompt_embeddings_0..3`, the following blocks' in order; with a reversed depth there are only the latter
    * `prompt_proj` is the projection; an adapter without one gets the projected prompts
    * `prompt_embeddings_tb`, `_lr`: the frame; with LOCATION=below `prompt_embeddings` (1, p, H, W) are channels, and
      `patch_embeddings.weight` (C, 3 + p, h, w) holds their weights; prepend-pixel: (1, 3, h, p * w)
    """
    config = next((c for c in state_of(model).adapters[name].configs if c.name == "vpt"), None)
    if config is None:
        raise ValueError("the adapter has no VPT: attach VPTConfig first")
    first = re.compile(r"(.+\.)?(deep_)?prompt_embeddings(_tb|_0)?")
    match = next(filter(None, map(first.fullmatch, state_dict)), None)
    if match is None:
        raise ValueError("no prompt_embeddings in the state dict: this is no VPT checkpoint")
    read = _Reader(state_dict, match[1] or "")
    own = adapter_tensors(model, name)
    if config.location in ("padding", "concat-channel", "prepend-pixel"):
        found = _vpt_pixels(config.location, own, read)
    else:
        found = _vpt_prompts(model, config, own, read)
    return _with_head(model, name, state_dict, found, len(read.used), "head.last_layer.")


class _Reader:
    """Takes tensors out of a state dict by their names behind a prefix, and remembers which."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str):
        self.state_dict, self.prefix = state_dict, prefix
        self.used: set[str] = set()

    def get(self, leaf: str) -> Tensor | None:
        tensor = self.state_dict.get(self.prefix + leaf)
        if tensor is not None:
            self.used.add(leaf)
        return tensor

    def __getitem__(self, leaf: str) -> Tensor:
        tensor = self.get(leaf)
        if tensor is None:
            raise ValueError(f"the checkpoint has no {self.prefix}{leaf}: attach the location that it was trained with")
        return tensor


def _vpt_prompts(model: nn.Module, config: Method, own: dict[str, Tensor], read: _Reader) -> dict[str, Tensor]:
    leaves = ["prompt_embeddings", "deep_prompt_embeddings"]
    leaves += [f"deep_prompt_embeddings_{stage}" for stage in range(4)]
    rows = [row for tensor in map(read.get, leaves) if tensor is not None for row in tensor]
    found = {}
    if read.prefix + "prompt_proj.weight" in read.state_dict:
        weight, bias = read["prompt_proj.weight"], read["prompt_proj.bias"]
        layers = [key.removesuffix("weight") for key in own if ".project." in key and key.endswith("weight")]
        if layers:
            found = {
                f"{layer}{leaf}": tensor for layer in layers for leaf, tensor in (("weight", weight), ("bias", bias))
            }
        else:
            rows = [F.linear(row, weight, bias) for row in rows]
    keys = [key for key in own if key.endswith(".vpt.embedding")]
    anatomy = anatomy_of(model)
    order = {f"{anatomy.canonical(block.path)}.": i for i, block in enumerate(anatomy.blocks())}
    keys.sort(key=lambda key: next(i for path, i in order.items() if key.startswith(path)))
    if config.shared in ("inter", "all"):  # deep_prompt_embeddings exist, and no block reads them
        rows = rows[:1]
    if len(rows) != len(keys):
        if config.depth is not None:
            advice = f"depth={len(rows)}"
        else:
            advice = f"VPTConfig(deep={len(rows) > len(keys)})"
        raise ValueError(f"the checkpoint prompts {len(rows)} blocks, the adapter {len(keys)}: attach {advice}")
    return found | dict(zip(keys, rows, strict=True))


def _vpt_pixels(location: str, own: dict[str, Tensor], read: _Reader) -> dict[str, Tensor]:
    key = {leaf: next((key for key in own if key.endswith(leaf)), "") for leaf in _VPT_PIXELS[location]}
    if location == "padding":
        return {key[f".vpt.{leaf}"]: read[f"prompt_embeddings_{leaf}"] for leaf in ("tb", "lr")}
    if location == "prepend-pixel":
        return {key[".vpt.pixels"]: read["prompt_embeddings"]}
    weight = read["embeddings.patch_embeddings.weight"]
    bias = read.get("embeddings.patch_embeddings.bias")
    colours = own[key["patch_embed.proj.weight"]].shape[1]
    found = {
        key[".vpt.image"]: read["prompt_embeddings"],
        key[".vpt.weight"]: weight[:, colours:],
        key["patch_embed.proj.weight"]: weight[:, :colours],
    }
    own_bias = own[key["patch_embed.proj.bias"]].detach().clone()
    return found | {key["patch_embed.proj.bias"]: own_bias if bias is None else bias}


_VPT_PIXELS = {
    "padding": (".vpt.tb", ".vpt.lr"),
    "prepend-pixel": (".vpt.pixels",),
    "concat-channel": (".vpt.image", ".vpt.weight", "patch_embed.proj.weight", "patch_embed.proj.bias"),
}


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
SOURCES |= official_adapters.SOURCES | official_clip.SOURCES | official_points.SOURCES
