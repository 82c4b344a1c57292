"""A weights file of one's own, for architectures of libraries that have no function for it."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, which is read with weights_only=True. What training scripts
    put around them ("state_dict", "model", "module.") is taken off."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content.get(key), dict) else content
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor], head: Collection[str], source: str) -> None:
    """Load every tensor. `head` names the classifier's tensors: they may be missing or of another number of classes,
    and are then left as they are. ValueError where anything else does not fit."""
    wanted = model.state_dict()
    weights = {name: t for name, t in weights.items() if name not in head or wanted[name].shape == t.shape}
    wrong = [f"{n} is {tuple(t.shape)}" for n, t in weights.items() if n in wanted and wanted[n].shape != t.shape]
    missing = [name for name in wanted if name not in weights and name not in head]
    if wrong or missing:
        problem = f"lacks {len(missing)} tensors, such as {missing[0]}" if missing else f"does not fit: {wrong[0]}"
        raise ValueError(f"{source} {problem}: it belongs to another model than {type(model).__name__}")
    model.load_state_dict(weights, strict=False)
