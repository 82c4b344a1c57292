"""State that methods compute from the training data before training: `Method.prepare`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deltalens.lifecycle.state import state_of


@torch.no_grad()
def prepare(model: nn.Module, loader: Iterable[Any]) -> nn.Module:
    """Let the active adapters' methods take from the training data what they need (SCT's channels). Returns the model.

    Call it once after attach and before a training loop of your own; `deltalens.training.fit` does it by itself. loader
    gives batches (images, labels). Methods that need nothing do not read it, and what an adapter already holds, from a
    file or an earlier call, stays. The model runs in eval mode, without gradients and, if it is compiled, uncompiled.
    """
    state, training = state_of(model), model.training
    methods = [method for name in state.active for method in state.adapters[name].configs]
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            for method in methods:
                method.prepare(model, loader)
    finally:
        model.train(training)
    return model
