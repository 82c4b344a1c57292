"""LoRA adapters in peft's file format, both ways.

peft holds one A (r, in) and one B (out, r) per nn.Linear. Ours holds a pair for each of q, k, v inside a fused layer;
written for peft they become one pair of rank r * parts with a block-diagonal B and alpha scaled alike, so that
alpha / r stays. A file of ours keeps its `methods` block beside peft's keys, which peft ignores with a warning, and is
split again on loading.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.backbones.describe import describe, own_backbone
from deltalens.lifecycle.state import KEY
from deltalens.lifecycle.tensors import anatomy_of, inserted_tensors
from deltalens.lifecycle.transfer import places
from deltalens.methods.base import Method, make_config
from deltalens.methods.lora import LoRAConfig
from deltalens.sites.anatomy import Anatomy, Part, Site
from deltalens.sites.weights import caller_of

PREFIX = "base_model.model."


def applies(model: nn.Module, configs: list[Method]) -> bool:
    """Whether an adapter can be written in peft's format: LoRA and a head, nothing else, on layers that the plain model
    calls. Where it reads their weights itself (nn.MultiheadAttention, torchvision's Swin), peft's wrapper of the layer
    would be passed over without a word."""
    if len(configs) != 1 or not isinstance(configs[0], LoRAConfig):
        return False
    anatomy = anatomy_of(model)
    return all(caller_of(anatomy, path) is None for path in _layers(anatomy, configs[0]))


def is_peft(config: dict[str, Any]) -> bool:
    return config.get("peft_type") == "LORA"


# ------------------------------------------------------------------ writing
def encode(
    model: nn.Module, name: str, tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our tensors and configuration of a LoRA adapter -> peft's, with our keys kept in the configuration."""
    lora = make_config(**_keywords(config["methods"][0]))
    inserted = inserted_tensors(model, name)
    layers: dict[str, list[tuple[slice, str]]] = defaultdict(list)
    for path, part, rows in _parts(anatomy_of(model), lora):
        layers[path].append((rows, f"{path}.{part}.lora"))
    widths = {anatomy_path: layer.out_features for anatomy_path, layer in _linears(model)}
    found = {PREFIX + key: tensor for key, tensor in tensors.items() if key not in inserted}
    ranks, alphas = {}, {}
    for path, parts in layers.items():
        downs = [tensors[f"{key}.lora_A.weight"] for _, key in parts]
        up = downs[0].new_zeros(widths[path], len(parts) * lora.r)
        for i, (rows, key) in enumerate(parts):
            up[rows, i * lora.r : (i + 1) * lora.r] = tensors[f"{key}.lora_B.weight"]
        found[f"{PREFIX}{path}.lora_A.weight"], found[f"{PREFIX}{path}.lora_B.weight"] = torch.cat(downs), up
        if len(parts) > 1:
            ranks[path], alphas[path] = len(parts) * lora.r, len(parts) * lora.alpha
    peft_keys = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items()},
        "modules_to_save": config["heads"] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    return found, {**config, **peft_keys}


# ------------------------------------------------------------------ reading
def decode(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's configuration and tensors -> ours. Raises ValueError for LoRA variants that are not plain LoRA."""
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if config.get("methods"):
        return config, _split(model, config, tensors)
    for key, plain in (("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key, plain) != plain:
            raise ValueError(f"this peft adapter has {key}={config[key]!r}; only plain LoRA can be loaded")
    anatomy = anatomy_of(model) if KEY in model.__dict__ else describe(model, own_backbone(model))
    present = {path for path, _ in model.named_modules()}
    groups: dict[tuple[int, float], list[str]] = defaultdict(list)
    ours, rest = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            rest[key] = tensor
            continue
        path = anatomy.canonical(match[1]) if match[1] in present else match[1]  # peft has the model's own paths
        if "base_layer" in path.split("."):
            raise ValueError(
                f"this peft adapter changes an nn.MultiheadAttention ({path.partition('.base_layer')[0]}), where peft "
                "0.21 adds the change of out_proj twice: the file does not tell what was trained. Train it again with "
                "LoRAConfig(parts=('q', 'k', 'v', 'proj'))"
            )
        ours[f"{path}.all.lora.{match[2]}.weight"] = tensor
        if match[2] == "lora_A":
            rank = tensor.shape[0]
            alpha = _pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", rank))
            groups[rank, alpha * (math.sqrt(rank) if config.get("use_rslora") else 1)].append(path)
    if not groups:
        raise ValueError("this peft adapter holds no LoRA tensors")
    methods = [
        LoRAConfig(r=rank, alpha=alpha, target_modules=tuple(paths), dropout=config.get("lora_dropout", 0.0)).to_dict()
        for (rank, alpha), paths in groups.items()
    ]
    heads = [key for key in rest if key.endswith(".weight") and rest[key].dim() == 2]
    classes = {rest[key].shape[0] for key in heads}
    num_classes = classes.pop() if len(classes) == 1 else None
    head_paths = [key.removesuffix(".weight") for key in heads]
    return {**config, "methods": methods, "num_classes": num_classes, "heads": head_paths}, {**ours, **rest}


def _split(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    lora, base = make_config(**_keywords(config["methods"][0])), config.get("base_model") or {}
    where = places(model, base)
    anatomy = (
        anatomy_of(model)
        if KEY in model.__dict__
        else describe(model, where["backbone"], where["blocks"], where["tower"])
    )
    taken: dict[str, int] = defaultdict(int)
    found = {}
    for path, part, rows in _parts(anatomy, lora):
        start = taken[path]
        taken[path] += lora.r
        down, up = tensors.get(f"{path}.lora_A.weight"), tensors.get(f"{path}.lora_B.weight")
        if down is None or up is None:
            continue
        found[f"{path}.{part}.lora.lora_A.weight"] = down[start : start + lora.r].contiguous()
        found[f"{path}.{part}.lora.lora_B.weight"] = up[rows, start : start + lora.r].contiguous()
    used = {f"{path}.lora_{side}.weight" for path in taken for side in "AB"}
    return found | {key: tensor for key, tensor in tensors.items() if key not in used}


# ------------------------------------------------------------------ details
def _keywords(entry: dict[str, Any]) -> dict[str, Any]:
    return {"name" if key == "method" else key: value for key, value in entry.items()}


def _pattern(patterns: dict[str, float] | None, path: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    canonical = anatomy_of(model).canonical
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield canonical(path), module


def _parts(anatomy: Anatomy, lora: LoRAConfig) -> Iterator[tuple[str, str, slice]]:
    """(layer path, part, its rows) for every LoRA pair that the configuration places, in its order."""
    for site, slot, _ in lora.place(anatomy):
        name = slot.partition(":")[2]
        part = site.parts[name]
        yield anatomy.canonical(_layer_path(site, part)), name, slice(*(part.rows or (None, None)))


def _layers(anatomy: Anatomy, lora: LoRAConfig) -> set[str]:
    """Paths in this model of the layers that the configuration changes."""
    return {_layer_path(site, site.parts[slot.partition(":")[2]]) for site, slot, _ in lora.place(anatomy)}


def _layer_path(site: Site, part: Part) -> str:
    return ".".join(piece for piece in (site.path, part.path) if piece)
