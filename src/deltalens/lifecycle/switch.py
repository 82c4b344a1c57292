"""Several adapters on one model: choose, disable, delete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from deltalens.lifecycle.state import (
    adapter_of,
    all_slots,
    put_buffer,
    put_class_count,
    put_module,
    put_parameter,
    state_of,
)
from deltalens.lifecycle.wrapped import put_originals, put_wrappers, refuse_doubly_wrapped
from deltalens.sites.slots import ADAPTER_PREFIX


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Make one adapter active, or several: their modules act together, head and unfrozen tensors are the last one's.

    The active adapters become trainable, all others frozen; what was inactive is moved and cast to the model's device
    and dtype.
    """
    state = state_of(model)
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    for each in names:
        adapter_of(model, each)
    refuse_doubly_wrapped(state, names)
    put_originals(model)
    for wrapping in state.active_wrappings():
        wrapping.remember_place()
    _keep_buffers(model)
    state.active = names
    for _, slots in all_slots(model):
        slots.active = names
        for adapters in slots.children():
            for key, modules in adapters.items():
                modules.requires_grad_(key.removeprefix(ADAPTER_PREFIX) in names)
    chosen = [state.adapters[each] for each in names]
    for path, original in state.parameters.items():
        put_parameter(model, path, next((a.parameters[path] for a in chosen[::-1] if path in a.parameters), original))
    for path, buffer in state.buffers.items():
        put_buffer(model, path, next((a.buffers[path] for a in chosen[::-1] if path in a.buffers), buffer))
    for path, original in state.heads.items():
        put_module(model, path, next((a.heads[path] for a in chosen[::-1] if path in a.heads), original))
    for adapter in state.adapters.values():
        for wrapping in adapter.wrappings:
            wrapping.enable(adapter in chosen)
    for wrapping in state.active_wrappings():
        wrapping.follow()
    put_wrappers(model)
    num_classes = next((a.num_classes for a in chosen[::-1] if a.num_classes is not None), state.num_classes)
    if state.num_classes is not None:
        put_class_count(model, num_classes)
    model.train(model.training)


def _keep_buffers(model: nn.Module) -> None:
    """Hand running statistics back to whom they belong: a module may have replaced its buffer objects."""
    state = state_of(model)
    for path in state.buffers:
        present = model.get_buffer(path)
        owner = next((state.adapters[n] for n in state.active[::-1] if path in state.adapters[n].buffers), state)
        owner.buffers[path] = present


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model is its plain backbone with its original head."""
    active = state_of(model).active
    set_adapter(model, ())
    try:
        yield model
    finally:
        set_adapter(model, active)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter. An active one is deactivated first."""
    adapter_of(model, name)
    state = state_of(model)
    set_adapter(model, tuple(each for each in state.active if each != name))
    for _, slots in all_slots(model):
        slots.remove(name)
    del state.adapters[name]


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the active adapters, in order."""
    return state_of(model).active
