"""Optimisers over the trained parameters: decay groups, per-method rates, default learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from deltalens.backbones import describe
from deltalens.lifecycle.state import KEY, state_of
from deltalens.methods.base import Method

_DECAYED = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention)


def default_learning_rate(methods: Iterable[Method]) -> float:
    """The method's own default, for AdamW at batch size 64; of several that make one adapter, the smallest."""
    return min(method.learning_rate for method in methods)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, no_decay: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for a torch optimiser.

    Weight decay acts on the matrices of linear and convolution layers only: not on biases, norms, other 1-D tensors,
    nor on free tensors such as prompts, position embeddings, tokens and tables. With no_decay it acts on every one
    instead, but for those whose path has one of these texts in it. Learning rates are multiplied as the active
    adapters' `lr_multipliers` and `unfreeze_multiplier` ask; where several substrings match a path, their factors
    multiply.

    Raises ValueError where nothing is trainable.
    """
    multipliers, unfrozen = _multipliers(model), _unfrozen_multipliers(model)
    decayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _DECAYED)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dim() > 1
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = unfrozen.get(id(parameter), 1.0)
        for substring, multiplier in multipliers:
            factor *= multiplier if substring in path else 1.0
        spared = id(parameter) not in decayed if no_decay is None else any(text in path for text in no_decay)
        decay = 0.0 if spared else weight_decay
        group = groups.setdefault(
            (decay, factor), {"params": [], "names": [], "lr": lr * factor, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(path)
    if not groups:
        if trains_nothing(model):
            raise ValueError(
                "nothing is trainable: this adapter is made by deltalens.prepare(model, loader) alone, without training"
            )
        raise ValueError("nothing is trainable: attach an adapter first")
    return list(groups.values())


def trains_nothing(model: nn.Module) -> bool:
    """Whether all of an adapter comes from `deltalens.prepare` (Tip-Adapter without trained keys)."""
    free = any(getattr(module, "training_free", False) for module in model.modules())
    return free and not any(parameter.requires_grad for parameter in model.parameters())


def make_optimizer(name: str, groups: list[dict[str, Any]], eps: float = 1e-8) -> torch.optim.Optimizer:
    """ "adamw" (betas .9, .999, and eps) or "sgd" (momentum .9)."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(groups, eps=eps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=0.9)
    raise ValueError(f"optimizer must be adamw or sgd, got {name!r}")


def _multipliers(model: nn.Module) -> list[tuple[str, float]]:
    """(substring, factor) of every active method of every adapted model in the tree."""
    found = []
    for module in model.modules():
        if KEY in module.__dict__:
            state = state_of(module)
            for name in state.active:
                for method in state.adapters[name].configs:
                    found += list(method.lr_multipliers().items())
    return found


def _unfrozen_multipliers(model: nn.Module) -> dict[int, float]:
    """id of a parameter -> factor, for what active methods unfreeze at another rate."""
    found: dict[int, float] = {}
    for module in model.modules():
        if KEY in module.__dict__:
            state = state_of(module)
            methods = [method for name in state.active for method in state.adapters[name].configs]
            for method in (method for method in methods if method.unfreeze_multiplier() != 1):
                anatomy = describe(module, state.backbone, state.blocks, state.tower)
                for path in method.unfreeze(anatomy):
                    found[id(module.get_parameter(path))] = method.unfreeze_multiplier()
    return found
