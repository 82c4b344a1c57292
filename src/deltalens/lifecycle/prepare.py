"""What methods take from data beside training: state before it (`Method.prepare`), settings after it
(`Method.finish`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from deltalens.lifecycle.state import KEY, State, state_of
from deltalens.methods.base import Method


@torch.no_grad()
def prepare(model: nn.Module, loader: Iterable[Any]) -> nn.Module:
    """Let the active adapters' methods take from the training data what they need (SCT's channels). Returns the model.

    Call it once after attach and before a training loop of your own; `deltalens.training.fit` does it by itself. loader
    gives batches (images, labels). Methods that need nothing do not read it, and what an adapter already holds, from a
    file or an earlier call, stays. The model runs in eval mode, without gradients and, if it is compiled, uncompiled.
    """
    with _evaluating(model):
        for method in _active_methods(state_of(model)):
            method.prepare(model, loader)
    return model


@torch.no_grad()
def finish(model: nn.Module, loader: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Let the active adapters' methods choose settings on validation images (Tip-Adapter's alpha and beta).

    Call it once after a training loop of your own, and before the test; `deltalens.training.fit` does it by itself
    where there are validation images. loader gives their batches (images, labels), never test images. Returns what was
    chosen, method -> setting -> value; the adapters' configurations, and so their files, have it. The model runs as in
    `prepare`.
    """
    state, chosen = state_of(model), {}
    with _evaluating(model):
        for name in state.active:
            configs = state.adapters[name].configs
            for index, method in enumerate(configs):
                values = method.finish(model, loader)
                if values:
                    chosen[method.name] = values
                    configs[index] = dataclasses.replace(method, **values)
    return chosen


@torch.no_grad()
def remarks(model: nn.Module, loader: Iterable[Any]) -> list[str]:
    """What the active adapters' methods have to say when training is over. loader gives training batches; it is not
    read where no method has anything to look at."""
    methods = [method for method in _active_methods(state_of(model)) if type(method).remarks is not Method.remarks]
    if not methods:
        return []
    with _evaluating(model):
        return list(dict.fromkeys(text for method in methods for text in method.remarks(model, loader)))


def has_choices(model: nn.Module) -> bool:
    """Whether an active method may choose settings after training."""
    if KEY not in model.__dict__:
        return False
    return any(type(method).finish is not Method.finish for method in _active_methods(state_of(model)))


def _active_methods(state: State) -> list[Method]:
    return [method for name in state.active for method in state.adapters[name].configs]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        model.train(training)
