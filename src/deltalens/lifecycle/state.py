"""What a model remembers of its adapters: a plain object in `model.__dict__`, never a child module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method
from deltalens.methods.wrapping import Wrapping
from deltalens.sites.anatomy import Family
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_method

KEY = "_deltalens"
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(eq=False)
class Adapter:
    """One adapter: its methods, and the tensors, heads and wrappers that replace the backbone's while it is active.

    info: what files carry beside tensors (class names, metrics, preprocessing).
    """

    configs: list[Method]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    wrappings: list[Wrapping] = field(default_factory=list)
    num_classes: int | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class State:
    """Adapters by name, the active ones in order, and everything needed to give the backbone back.

    num_classes: what the plain model says. labels: the names of its classes both ways, as a transformers configuration
    holds them, or None. tower: the one tower that is adapted, None for all.
    """

    backbone: str | None
    blocks: str | None
    requires_grad: dict[str, bool]
    num_classes: int | None
    labels: tuple[dict, dict] | None = None
    tower: str | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def frozen_mode(self) -> str:
        configs = [config for name in self.active for config in self.adapters[name].configs]
        return "train" if any(config.frozen_mode == "train" for config in configs) else "eval"

    def wrapped_layers(self) -> dict[str, nn.Module]:
        """Path -> the backbone's own layer, of every layer that some adapter wraps."""
        wrappings = [wrapping for adapter in self.adapters.values() for wrapping in adapter.wrappings]
        return {path: layer for wrapping in wrappings for path, layer in wrapping.originals.items()}

    def active_wrappings(self) -> list[Wrapping]:
        return [wrapping for name in self.active for wrapping in self.adapters[name].wrappings]


def state_of(model: nn.Module) -> State:
    """The state of an adapted model; ValueError for one that has no adapters."""
    state = model.__dict__.get(KEY)
    if state is None:
        raise ValueError(f"{type(model).__name__} has no adapters: call deltalens.attach(model, ...) first")
    return state


def adapter_of(model: nn.Module, name: str | None = None) -> tuple[str, Adapter]:
    """(name, adapter): the named one, or the last active one. ValueError with the known names otherwise."""
    state = state_of(model)
    if name is None:
        if not state.active:
            raise ValueError(f"no adapter is active; known adapters: {', '.join(state.adapters)}")
        name = state.active[-1]
    if name not in state.adapters:
        raise ValueError(f"no adapter named {name!r}; known adapters: {', '.join(state.adapters)}")
    return name, state.adapters[name]


def all_slots(model: nn.Module) -> Iterator[tuple[str, Slots]]:
    """(path of the owning module, slots) throughout the model."""
    for path, module in model.named_modules():
        if isinstance(module, Slots):
            yield path.rpartition(".")[0], module


# ------------------------------------------------------------------ what the root of an adapted model does differently
def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """nn.Module.train, then hold frozen modules in eval mode as the active methods ask."""
    original_method(self, "train")(mode)
    if mode and KEY in self.__dict__:
        hold_frozen(self)
    return self


def hold_frozen(model: nn.Module) -> None:
    """Put frozen modules in eval mode: all of them, or BatchNorm only where a method keeps the rest active."""
    state = state_of(model)
    live = {id(m) for _, slots in all_slots(model) for module in slots.children() for m in module.modules()}
    for name in state.active:
        for head in state.adapters[name].heads.values():
            live |= {id(m) for m in head.modules()}
    live |= {id(m) for wrapping in state.active_wrappings() for m in wrapping.modules()}
    for module in model.modules():
        if id(module) in live or module is model:
            continue
        trains = any(p is not None and p.requires_grad for p in module._parameters.values())
        if isinstance(module, _BATCH_NORMS):
            module.training = trains
        elif state.frozen_mode == "eval":  # transformers' layers checkpoint in train mode only
            module.training = getattr(module, "gradient_checkpointing", False) is True


def _load_state_dict(self: nn.Module, state_dict, strict: bool = True, assign: bool = False):
    """nn.Module.load_state_dict, with a hint where a plain backbone checkpoint meets an adapted model."""
    try:
        return original_method(self, "load_state_dict")(state_dict, strict=strict, assign=assign)
    except RuntimeError as error:
        missing = [name for name in self.state_dict() if name not in state_dict]
        wrapped = tuple(f"{path}." for wrapping in state_of(self).active_wrappings() for path in wrapping.layers)
        if missing and all("delta" in name.split(".") or name.startswith(wrapped) for name in missing):
            raise RuntimeError(
                "this is a checkpoint of the plain backbone, and the model has adapters: load it before attach, or "
                "pass strict=False to leave the adapters as they are; to load an adapter, use deltalens.load_adapter"
            ) from error
        raise


ROOT = Family(
    name="deltalens.lifecycle.state:ROOT",
    methods={"train": _train, "load_state_dict": _load_state_dict},
)


def plain_labels(model: nn.Module) -> tuple[dict, dict] | None:
    """(id2label, label2id) of a transformers classifier, None for other models."""
    config = getattr(model, "config", None)
    if hasattr(model, "num_classes") or not hasattr(model, "num_labels") or not hasattr(config, "id2label"):
        return None
    return config.id2label, config.label2id


def put_class_count(model: nn.Module, count: int) -> None:
    """Let the model say how many classes its present head has; the plain model's own count brings its names back."""
    state = state_of(model)
    if state.labels is None:
        if hasattr(model, "num_classes"):
            model.num_classes = count
        return
    model.num_labels = count
    if count == state.num_classes:
        model.config.id2label, model.config.label2id = state.labels
    else:
        model.config.num_labels = count  # makes names LABEL_0, LABEL_1...


def put_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Install a parameter object, moved and cast to where the present one is."""
    owner, _, leaf = path.rpartition(".")
    registered = model.get_submodule(owner)._parameters
    _follow(parameter, registered[leaf])
    registered[leaf] = parameter


def put_buffer(model: nn.Module, path: str, buffer: Tensor) -> None:
    """Install a buffer, moved and cast to where the present one is."""
    owner, _, leaf = path.rpartition(".")
    registered = model.get_submodule(owner)._buffers
    registered[leaf] = buffer.to(registered[leaf].device, registered[leaf].dtype)


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Install a module at a path, moved and cast to where the present one is."""
    present = next(model.get_submodule(path).parameters(), None)
    if present is not None:
        for parameter in module.parameters():
            _follow(parameter, present)
        for buffer_owner in module.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    dtype = present.dtype if buffer.is_floating_point() else None
                    buffer_owner._buffers[name] = buffer.to(present.device, dtype)
    model.set_submodule(path, module)


def _follow(parameter: nn.Parameter, present: Tensor) -> None:
    if parameter.device != present.device or parameter.dtype != present.dtype:
        with torch.no_grad():
            parameter.data = parameter.data.to(present.device, present.dtype)
