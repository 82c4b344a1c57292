"""The loss terms that the active adapters' methods add to a task's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltalens.lifecycle.state import KEY, state_of


def method_losses(model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
    """ "<method>.<term>" -> scalar of every term of `Method.losses`; none for a model without adapters."""
    if KEY not in model.__dict__:
        return {}
    state = state_of(model)
    methods = [method for name in state.active for method in state.adapters[name].configs]
    return {
        f"{method.name}.{term}": loss
        for method in methods
        for term, loss in method.losses(model, output, batch).items()
    }
