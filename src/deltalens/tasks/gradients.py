"""The backward pass of methods that make one gradient of those of several loss terms (ProGrad)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import KEY, state_of
from deltalens.methods.base import Method


def gradient_rule(model: nn.Module) -> Method | None:
    """The active method of an adapted model that overrides `Method.combine`, None without one. ValueError for two."""
    if KEY not in model.__dict__:
        return None
    state = state_of(model)
    methods = [method for name in state.active for method in state.adapters[name].configs]
    rules = [method for method in methods if type(method).combine is not Method.combine]
    if len(rules) > 1:
        raise ValueError(f"{rules[0].name} and {rules[1].name} each have a gradient rule: use one of the two")
    return rules[0] if rules else None


def backward(task: nn.Module, result: dict[str, Any], loss: Tensor | None = None) -> None:
    """Fill `.grad` of the trained parameters from a task's result.

        result = task(batch)
        backward(task, result)                                       # result["loss"].backward() without a rule
        backward(task, result, scaler.scale(result["loss"]))         # with a GradScaler

    loss: the result's loss times a factor. With a gradient rule every loss term has its own backward, and what the rule
    makes of the gradients becomes `.grad`. A rule is for whole batches: ValueError where gradients of an earlier batch
    are still there.
    """
    loss = result["loss"] if loss is None else loss
    rule = gradient_rule(task.model)
    if rule is None:
        loss.backward()
        return
    trained = [p for p in task.parameters() if p.requires_grad]
    if any(p.grad is not None and bool(p.grad.any()) for p in trained):
        raise ValueError(
            f"{rule.name}'s gradient rule wants the gradients of a whole batch, and there are some of an earlier one: "
            "call zero_grad() before, and do not accumulate"
        )
    (factor,) = torch.autograd.grad(loss, result["loss"], retain_graph=True)
    gradients, reached = {}, [False] * len(trained)
    for name, term in result["terms"].items():
        found = _gradient(term, trained, factor)
        reached = [before or g is not None for before, g in zip(reached, found, strict=True)]
        gradients[name] = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]
    for parameter, gradient, there in zip(trained, rule.combine(gradients), reached, strict=True):
        if there:
            parameter.grad = gradient


def _gradient(term: Tensor, trained: list[nn.Parameter], factor: Tensor) -> list[Tensor | None]:
    if not term.requires_grad:
        return [None] * len(trained)
    return list(torch.autograd.grad(term, trained, factor, retain_graph=True, allow_unused=True))
