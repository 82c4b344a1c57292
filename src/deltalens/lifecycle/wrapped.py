"""Layers that methods wrap themselves: in place while their adapter is active, gone when it is not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from deltalens.lifecycle.state import KEY, State, state_of
from deltalens.methods.base import Method, Placement
from deltalens.methods.wrapping import Wrapping
from deltalens.sites.anatomy import Anatomy
from deltalens.sites.slots import ADAPTER_PREFIX

F = TypeVar("F", bound=Callable)


# ------------------------------------------------------------------ in place and out
def put_originals(model: nn.Module) -> None:
    """Put the backbone's own layers in the places of all wrappers."""
    for path, layer in state_of(model).wrapped_layers().items():
        model.set_submodule(path, layer)


def put_wrappers(model: nn.Module) -> None:
    """Put the wrappers of the active adapters in place."""
    for wrapping in state_of(model).active_wrappings():
        for path, layer in wrapping.layers.items():
            model.set_submodule(path, layer)


@contextlib.contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Within the context every layer is the backbone's own, so that names are its names; nothing else changes."""
    layers = state_of(model).wrapped_layers() if KEY in model.__dict__ else {}
    if all(model.get_submodule(path) is layer for path, layer in layers.items()):
        yield  # they are in place already, perhaps in a context around this one
        return
    put_originals(model)
    try:
        yield
    finally:
        if KEY in model.__dict__:
            put_wrappers(model)


def on_plain_layers(function: F) -> F:
    """Decorator: run a function of an adapted model with the backbone's own layers in place."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with plain_layers(args[0] if args else kwargs["model"]):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


# ------------------------------------------------------------------ what may be wrapped
def make_wrappings(
    configs: Sequence[Method], placements: Sequence[Sequence[Placement]], anatomy: Anatomy, state: State | None
) -> list[Wrapping]:
    """The wrappings of an adapter that is being attached. ValueError where a layer would be changed twice, by a wrapper
    and by a weight method, or by two wrappers of one adapter."""
    wrapped = {
        id(layer): f"{_names(adapter.configs)} of the adapter {name!r}"
        for name, adapter in (state.adapters.items() if state else ())
        for wrapping in adapter.wrappings
        for layer in wrapping.originals.values()
    }
    for method, placed in zip(configs, placements, strict=True):
        for path in _weight_paths(placed):
            _refuse(path, method.name, wrapped.get(id(anatomy.model.get_submodule(path))))
    changed = {
        id(anatomy.model.get_submodule(path)): method.name
        for method, placed in zip(configs, placements, strict=True)
        for path in _weight_paths(placed)
    }
    found = []
    for method in configs:
        wrapping = method.wrap(anatomy)
        if wrapping is None:
            continue
        for path, layer in wrapping.originals.items():
            _refuse(path, method.name, changed.get(id(layer)) or _weight_methods(layer))
            changed[id(layer)] = method.name
        found.append(wrapping)
    return found


def refuse_doubly_wrapped(state: State, names: Sequence[str]) -> None:
    """ValueError where two adapters that shall act together wrap the same layer."""
    owners: dict[str, str] = {}
    for name in names:
        for wrapping in state.adapters[name].wrappings:
            for path in wrapping.layers:
                if path in owners:
                    raise ValueError(
                        f"the adapters {owners[path]!r} and {name!r} both wrap {path}: they cannot act together, only "
                        "one after the other"
                    )
                owners[path] = name


def _weight_paths(placed: Sequence[Placement]) -> Iterator[str]:
    for site, slot, _ in placed:
        if slot.startswith("weights:"):
            part = site.parts[slot.partition(":")[2]]
            yield ".".join(piece for piece in (site.path, part.path) if piece)


def _weight_methods(layer: nn.Module) -> str | None:
    """The weight methods that a layer holds, of any adapter."""
    slots = layer._modules.get("delta")
    held = [
        f"{method} of the adapter {key.removeprefix(ADAPTER_PREFIX)!r}"
        for adapters in (slots.children() if slots is not None else ())
        for key, methods in adapters.items()
        for method in methods
    ]
    return ", ".join(dict.fromkeys(held)) or None


def _refuse(path: str, method: str, other: str | None) -> None:
    if other:
        raise ValueError(
            f"{method} cannot change {path}, which {other} changes already: layers wrapped by peft take one method "
            "only; choose other layers, or delete that adapter first"
        )


def _names(configs: Sequence[Method]) -> str:
    return ", ".join(config.name for config in configs)


# ------------------------------------------------------------------ for counting and merging
def wrapper_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that belong to wrappers in place, not to the layers they hold."""
    if KEY not in model.__dict__:
        return set()
    return {id(p) for wrapping in state_of(model).active_wrappings() for p in wrapping.parameters()}


def merge_wrapped(model: nn.Module) -> None:
    """Fold the active wrappers into their layers and put these back. NotImplementedError, before any change, where the
    library of a wrapper cannot merge it."""
    state = state_of(model)
    for wrapping in state.active_wrappings():
        wrapping.check_merge()
    for wrapping in state.active_wrappings():
        wrapping.merge()
    put_originals(model)
    for adapter in state.adapters.values():
        adapter.wrappings.clear()
