"""Which modules of an unknown network are its blocks, from one trace.

A *unit* is a module of the network's own that holds at least two weighted layers and returns a stream: layers with
their norm and activation are none. Units that one module calls one after another, each on what the one before
returned, or that sit in one list, are a *chain*. Blocks are the outermost classes of which one chain holds two with
equal results. So stages, whose results differ, are looked into, and what repeats inside a block does not count.

* Where results differ from unit to unit (widths that grow) and nothing repeats inside, the units are the blocks.
* A unit that returns several streams (HRNet's branches) is looked into first.
* Blocks of a class found so are blocks wherever they stand: a stage with a single one, a pair of other stages' blocks.
* Where no chain holds two of a class, its units need not be joined (a convolution may lie between them); then lists of
  plain layers may be units (ConvMixer); then any two joined units are blocks. Without units, layers with norm and
  activation are blocks, at last plain convolutions (VGG).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from deltalens.backbones.positions import BATCH
from deltalens.backbones.trace import Call, Stream, Trace
from deltalens.sites.swap import original_class

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Block(NamedTuple):
    """A block: its path and which of the tensors that it returns is its stream."""

    path: str
    stream: int


def find_blocks(model: nn.Module, trace: Trace) -> list[Block]:
    """The blocks in the order in which they are called."""
    for is_unit, loosened in (
        (_is_compound, ""),
        (_is_compound, "apart"),
        (_is_compound_list, "lists"),
        (_is_compound, "any class"),
        (_is_layer, ""),
        (_is_convolution, ""),
    ):
        finder = _Finder(model, trace, is_unit, loosened)
        paths = finder.inside("")
        if paths:
            found = finder.of_the_same_classes(paths)
            return [Block(path, stream_index(trace, path)) for path in sorted(found, key=finder.begin)]
    return []


def stream_index(trace: Trace, path: str) -> int | None:
    """Which returned tensor is the stream: one that the block has made itself and that lies beside its images, of
    several the one whose shape the next call keeps, then the widest, then the last. None where there is none."""
    streams = trace.calls[path].streams if path in trace.calls else ()
    fit = [i for i, each in enumerate(streams) if _fits(each)]
    own = [i for i in fit if not streams[i].is_input] or fit
    if len(own) < 2:
        return own[0] if own else None
    following = {identity for call in trace.calls.values() for identity in call.inputs}
    used = [i for i in own if streams[i].identity in following] or own
    proven = [i for i in used if streams[i].found] or used
    return max(proven, key=lambda i: (_width(streams[i]), i))


def _fits(stream: Stream) -> bool:
    return 3 <= len(stream.shape) <= 5 and BATCH in stream.shape[:2]


def _width(stream: Stream) -> int:
    return stream.shape[1] if stream.found and stream.found[0] == "first" else stream.shape[-1]


# ------------------------------------------------------------------ what may be a block
def _own_weights(module: nn.Module) -> int:
    return sum(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())


def _is_primitive(module: nn.Module) -> bool:
    """A layer of torch.nn or a subclass of one; torch's own transformer layers are blocks like any other."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, *_CONTAINERS)):
        return False
    return any(
        base.__module__.startswith(("torch.nn.", "torch.ao.")) and base is not nn.Module
        for base in original_class(module).__mro__
    )


def _is_compound(module: nn.Module) -> bool:
    return not _is_primitive(module) and sum(_own_weights(each) for each in module.modules()) > 1


def _is_layer(module: nn.Module) -> bool:
    return not _is_primitive(module) and any(_own_weights(each) for each in module.modules())


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def _is_compound_list(module: nn.Module) -> bool:
    return original_class(module) is nn.Sequential and sum(_own_weights(each) for each in module.modules()) > 1


def _kind(module: nn.Module) -> object:
    """What two blocks must have in common: the class, of a plain list of layers those of its members."""
    if original_class(module) is nn.Sequential:
        return (nn.Sequential, *(_kind(child) for name, child in module.named_children() if name != "delta"))
    return original_class(module)


class _Finder:
    """loosened: "apart" where two of a class need not be joined, "any class" where joined ones need not be of one
    class, "lists" where plain lists of layers within lists are units."""

    def __init__(self, model: nn.Module, trace: Trace, is_unit: Callable[[nn.Module], bool], loosened: str):
        self.model, self.trace, self.is_unit, self.loosened = model, trace, is_unit, loosened
        self.modules = dict(model.named_modules())

    def begin(self, path: str) -> int:
        return self.trace.calls[path].begin

    def inside(self, path: str) -> list[str]:
        """Paths of the blocks in a module."""
        units = list(self._units(path))
        strong, weak = set(), set()
        for chain in [units] if self.loosened == "apart" else self._chains(units):
            for first in chain:
                for second in chain:
                    if first < second and self._alike(first, second):
                        same = self._shape(first) == self._shape(second)
                        (strong if same else weak).update((first, second))
        strong_kinds = {_kind(self.modules[each]) for each in strong}
        found: list[str] = []
        for unit in units:
            if _kind(self.modules[unit]) in strong_kinds and stream_index(self.trace, unit) is not None:
                several = len([each for each in self.trace.calls[unit].streams if _fits(each)]) > 1
                found += (self.inside(unit) if several else []) or [unit]
        others = [unit for unit in units if _kind(self.modules[unit]) not in strong_kinds]
        within = {unit: self.inside(unit) for unit in others}
        for unit in others:
            alike = [each for each in others if self._alike(unit, each)]
            if unit in weak and not any(within[each] for each in alike):
                found.append(unit)
            found += within[unit]
        return found

    def of_the_same_classes(self, paths: list[str]) -> set[str]:
        """With every other module of the blocks' classes that lies in no block; without blocks inside blocks."""
        kinds = {_kind(self.modules[path]) for path in paths}
        found = set(paths)
        for path, module in self.modules.items():
            if path and self.is_unit(module) and _kind(module) in kinds and stream_index(self.trace, path) is not None:
                found.add(path)
        return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}

    def _units(self, path: str) -> Iterator[str]:
        """The units right under a module, through plain containers."""
        for name, child in self.modules[path].named_children():
            child_path = f"{path}.{name}".lstrip(".")
            if name == "delta" or self.modules.get(child_path) is not child:
                continue
            plain = original_class(child) in _CONTAINERS or (child_path not in self.trace.calls and len(child._modules))
            if self.loosened == "lists" and isinstance(self.modules[path], _CONTAINERS) and self.is_unit(child):
                plain = child_path not in self.trace.calls
            if plain:
                yield from self._units(child_path)
            elif child_path in self.trace.calls and self.is_unit(child):
                yield child_path

    def _chains(self, units: list[str]) -> list[list[str]]:
        """Units joined by what they hand on, or by their place in one list."""
        chain_of = {unit: {unit} for unit in units}

        def join(first: str, second: str) -> None:
            union = chain_of[first] | chain_of[second]
            for each in union:
                chain_of[each] = union

        for first in units:
            call: Call = self.trace.calls[first]
            given = {each.identity for each in call.streams if each.shape}
            for second in units:
                listed = isinstance(self.modules[first.rpartition(".")[0]], _CONTAINERS)
                together = listed and first.rpartition(".")[0] == second.rpartition(".")[0]
                if first != second and (together or given & self.trace.calls[second].inputs):
                    join(first, second)
        return [sorted(chain) for chain in {id(chain): chain for chain in chain_of.values()}.values()]

    def _alike(self, first: str, second: str) -> bool:
        return self.loosened == "any class" or _kind(self.modules[first]) == _kind(self.modules[second])

    def _shape(self, path: str) -> tuple[int, ...]:
        index = stream_index(self.trace, path)
        return () if index is None else self.trace.calls[path].streams[index].shape


def uncalled_layers(path: str, block: nn.Module, trace: Trace) -> frozenset[str]:
    """Linear layers that the block's forward goes around, as Swin v2 does with qkv to splice in its biases."""
    layers = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    return frozenset(name for name in layers if f"{path}.{name}" not in trace.calls)
