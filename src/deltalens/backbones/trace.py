"""One forward of fake tensors through a copy of a model: who was called, on what, with what result.

The copy has fake parameters, which hold no memory, and no adapters, so that a model is traced as its library made it;
nothing of the model itself is run or touched.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from deltalens.backbones.positions import BATCH, Follow, map_axes
from deltalens.sites.swap import unswap

OTHER_SIZES = (224, 256, 384, 192, 128, 64, 32, 48, 96, 160, 240, 288, 299, 320, 448, 512, 1024)


@dataclass(frozen=True)
class Stream:
    """One tensor that a module returned. `found` is what its positions prove: see `map_axes`."""

    identity: int
    shape: tuple[int, ...]
    found: tuple[str, tuple[int, int], int, frozenset[int]] | None
    is_input: bool


@dataclass
class Call:
    """The calls of one module: inputs of all of them by identity, results of the first."""

    begin: int
    inputs: set[int]
    end: int = -1
    streams: tuple[Stream, ...] = ()
    all_shapes: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)


@dataclass
class Trace:
    """calls: path -> its calls, in the order in which they began. maps: (path, when, origins) of every 4-D result that
    is a proven map, first format before last. receiver: the innermost module that got the image first."""

    size: tuple[int, int, int]
    calls: dict[str, Call] = field(default_factory=dict)
    maps: list[tuple[str, int, str, frozenset[int]]] = field(default_factory=list)
    receiver: str | None = None


def trace(model: nn.Module, size: tuple[int, int, int]) -> Trace:
    """Trace a model with images of the given (channels, height, width), or of another size where it refuses them."""
    channels, *declared = size
    sizes = [tuple(declared), *((other, other) for other in OTHER_SIZES if (other, other) != tuple(declared))]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, first_error = log.level, None
    log.setLevel(logging.CRITICAL)
    try:
        mode, plain = _fake_copy(model)
        for height, width in sizes:
            try:
                return _run(plain, mode, (channels, height, width))
            except Exception as error:
                first_error = first_error or error
    finally:
        log.setLevel(level)
    raise TypeError(
        f"{type(model).__name__} is of no known family, and a trial forward with an input of shape "
        f"{(BATCH, *size)} failed, so that its blocks cannot be described: {first_error}. A model that is not called "
        "with images alone can be adapted through the submodule that is: pass its path as backbone="
    ) from first_error


def _fake_copy(model: nn.Module) -> tuple[FakeTensorMode, nn.Module]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        plain = copy.deepcopy(model)
    for module in plain.modules():
        module._modules.pop("delta", None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module._compiled_call_impl = None
    for module in plain.modules():
        unswap(module)
    return mode, plain.eval()


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _run(model: nn.Module, mode: FakeTensorMode, size: tuple[int, int, int]) -> Trace:
    found, alive, clock, handles = Trace(size), [], [0], []
    floating = (p for p in model.parameters() if p.is_floating_point())
    like = next(floating, torch.empty(0))

    def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = list(_tensors((args, kwargs)))
        alive.extend(tensors)  # an identity must not be used twice
        clock[0] += 1
        call = found.calls.setdefault(path, Call(clock[0], set()))
        call.inputs |= {id(tensor) for tensor in tensors}
        if found.receiver is None and not module._modules and any(tensor is image for tensor in tensors):
            found.receiver = path

    def after(path: str, output: object) -> None:
        call, clock[0] = found.calls[path], clock[0] + 1
        items = output if isinstance(output, (tuple, list)) else (output,)
        tensors = [item if isinstance(item, Tensor) else None for item in items]
        alive.extend(tensors)
        call.all_shapes.add(tuple(() if each is None else tuple(each.shape) for each in tensors))
        with no_dispatch():
            streams = tuple(_stream(each, call) for each in tensors)
        if call.end < 0:
            call.end, call.streams = clock[0], streams if isinstance(output, (Tensor, tuple, list)) else ()
        if isinstance(output, Tensor) and streams[0].found and streams[0].found[0] != "tokens":
            found.maps.append((path, clock[0], streams[0].found[0], streams[0].found[3]))

    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: before(path, m, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, args, y, path=path: after(path, y)))
    try:
        with mode, torch.no_grad():
            image = torch.empty(BATCH, *size, device=like.device, dtype=like.dtype)
            with Follow():
                model(image)
    finally:
        for handle in handles:
            handle.remove()
        _empty_caches(model)
    return found


def _empty_caches(model: nn.Module) -> None:
    """Functions that remember results (transformers' rotary positions) may hold fake ones now: let them forget."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    own = {cls for cls in classes if cls.__module__.partition(".")[0] not in ("builtins", "torch", "deltalens")}
    for place in [*own, *(sys.modules[name] for name in {cls.__module__ for cls in own} if name in sys.modules)]:
        for value in list(vars(place).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def _stream(tensor: Tensor | None, call: Call) -> Stream:
    if tensor is None or not tensor.is_floating_point():
        return Stream(0, (), None, False)
    return Stream(id(tensor), tuple(tensor.shape), map_axes(tensor), id(tensor) in call.inputs)
