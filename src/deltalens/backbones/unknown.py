"""The fallback for networks that no family knows: repeated blocks found by a trial forward, one slot at their output.

See `repeats` for what a block is, `positions` for when its stream is proven to be a map. A stream that is not is a
plain sequence, where methods with spatial modules are refused with the reason.
"""

from __future__ import annotations

import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from torch import nn

from deltalens.backbones.classifier import find_heads
from deltalens.backbones.pixels import IMAGE, STEM, read_pixels
from deltalens.backbones.positions import BATCH
from deltalens.backbones.preprocessing import PREPROCESSING_KEY
from deltalens.backbones.repeats import Block, find_blocks, stream_index, uncalled_layers
from deltalens.backbones.trace import Trace, trace
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.layout import ChannelsFirst, ChannelsLast, Layout, PlainFirst, Sequence, Tokens
from deltalens.sites.swap import inner_method, original_class

MOST_STREAMS = 8


# ------------------------------------------------------------------ how unknown blocks read
def _reading(index: int):
    """stream(block(...)), applied to the output, or to one of its elements where a block returns several."""

    def forward(self: nn.Module, *args, **kwargs):
        y, slots = inner_method(self, "forward")(*args, **kwargs), self.delta
        if not isinstance(y, (tuple, list)):
            return slots.chain("block.stream", y, slots.layout)
        items = [*y[:index], slots.chain("block.stream", y[index], slots.layout), *y[index + 1 :]]
        return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)

    return forward


# nn.Sequential runs its children, and whoever goes through them must not meet the adapters
def _own_children(self: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, child) for name, child in self._modules.items() if name != "delta"))


def _iterate(self: nn.Sequential) -> Iterator[nn.Module]:
    return iter(_own_children(self))


def _length(self: nn.Sequential) -> int:
    return len(self._modules) - ("delta" in self._modules)


def _item(self: nn.Sequential, index: int | slice):
    return _own_children(self)[index]


def _first_map(self: nn.Module, *args, **kwargs):
    y = read_pixels(self, *args, **kwargs)
    self.__dict__["delta_layout"].record(*y.shape[2:4])
    return y


def _last_map(self: nn.Module, *args, **kwargs):
    y = read_pixels(self, *args, **kwargs)
    self.__dict__["delta_layout"].record(*y.shape[1:3])
    return y


UNKNOWN_BLOCK = Family(
    name="deltalens.backbones.unknown:UNKNOWN_BLOCK",
    methods={"forward": _reading(0)},
    slots=frozenset({"block.stream"}),
)
SEQUENTIAL_BLOCK = Family(
    name="deltalens.backbones.unknown:SEQUENTIAL_BLOCK",
    methods={"forward": _reading(0), "__iter__": _iterate, "__len__": _length, "__getitem__": _item},
    slots=frozenset({"block.stream"}),
)
# blocks whose stream is another than the first of the tensors that they return
STREAMS = SimpleNamespace(
    **{
        f"at_{i}": Family(
            name=f"deltalens.backbones.unknown:STREAMS.at_{i}",
            methods={"forward": _reading(i)},
            slots=frozenset({"block.stream"}),
        )
        for i in range(1, MOST_STREAMS)
    }
)


def _family(block: nn.Module, stream: int) -> Family:
    if stream:
        return getattr(STREAMS, f"at_{stream}")
    return SEQUENTIAL_BLOCK if isinstance(block, nn.Sequential) else UNKNOWN_BLOCK


CHANNELS_FIRST_EMBED = Family(name="deltalens.backbones.unknown:CHANNELS_FIRST_EMBED", methods={"forward": _first_map})
CHANNELS_LAST_EMBED = Family(name="deltalens.backbones.unknown:CHANNELS_LAST_EMBED", methods={"forward": _last_map})
# a module that both receives the pixels and gives the grid: the same readings, with slots
_PIXELS = frozenset({"image", "stem.parallel"})
CHANNELS_FIRST_PIXELS = Family(
    name="deltalens.backbones.unknown:CHANNELS_FIRST_PIXELS", methods={"forward": _first_map}, slots=_PIXELS
)
CHANNELS_LAST_PIXELS = Family(
    name="deltalens.backbones.unknown:CHANNELS_LAST_PIXELS", methods={"forward": _last_map}, slots=_PIXELS
)


# ------------------------------------------------------------------ the trace, remembered
def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) the model says it wants, 3x224x224 where it says nothing."""
    if PREPROCESSING_KEY in model.__dict__:  # what create_backbone knows from the model's library
        return tuple(model.__dict__[PREPROCESSING_KEY]["input_size"])
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and len(size) == 2:
        return (getattr(model, "in_chans", 3), *size)
    config = getattr(model, "config", None)  # of transformers; CLIP keeps its image tower's apart
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if isinstance(size, (int, tuple, list)) and size:
        height, width = (size, size) if isinstance(size, int) else size
        return (getattr(config, "num_channels", 3), height, width)
    return tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))


@dataclass(frozen=True)
class _Known:
    """What was found in a model while its structure was that."""

    structure: int
    pattern: str | None
    trace: Trace
    blocks: list[Block]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _structure(model: nn.Module) -> int:
    """A number that changes when modules, their settings or the shapes of their tensors do; adapters and what they put
    in the place of classifier layers do not count."""
    heads, facts = {*find_heads(model)}, [input_size(model)]
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if path in heads:
            continue
        shapes = tuple(None if p is None else tuple(p.shape) for p in module._parameters.values())
        facts.append((path, original_class(module), shapes, "" if module._modules else module.extra_repr()))
        children = [(name, child) for name, child in module._modules.items() if name != "delta" and child is not None]
        stack += [(f"{path}.{name}".lstrip("."), child) for name, child in children]
    return hash(tuple(facts))


def _look(model: nn.Module, pattern: str | None) -> _Known:
    structure = _structure(model)
    known = _KNOWN.get(model)
    if known is None or (known.structure, known.pattern) != (structure, pattern):
        same = known is not None and known.structure == structure
        found = known.trace if same else trace(model, input_size(model))
        if pattern is None:
            blocks = find_blocks(model, found)
        else:
            paths = [path for path in found.calls if re.fullmatch(pattern, path)]
            streams = [(path, stream_index(found, path)) for path in paths]
            blocks = [Block(path, index) for path, index in streams if index is not None]
        known = _KNOWN[model] = _Known(structure, pattern, found, blocks)
    return known


# ------------------------------------------------------------------ blocks and their layout
def _channels_are_second(block: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether an output without proven positions is (B, C, ...), not (B, ..., C): by which axis the block's own layers
    agree with."""
    first = sum(m.out_channels == shape[1] for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd))
    first += sum(m.num_features == shape[1] for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    last = sum(m.normalized_shape == (shape[-1],) for m in block.modules() if isinstance(m, nn.LayerNorm))
    last += sum(m.out_features == shape[-1] for m in block.modules() if isinstance(m, nn.Linear))
    return first > last


def _recorder(path: str, origins: frozenset[int], found: Trace, blocks: set[str]) -> tuple[str, Family] | None:
    """The module that returns the map which the tokens of a block are, and so knows their grid: the latest before the
    block is done, outside all blocks if there is one."""
    known = [
        (source, family) for source, when, family, of in found.maps if when < found.calls[path].end and of & origins
    ]
    if not known:
        return None
    outside = [each for each in known if not any(f"{each[0]}.".startswith(f"{block}.") for block in blocks)]
    source, family = (outside or known)[-1]
    return source, CHANNELS_FIRST_EMBED if family == "first" else CHANNELS_LAST_EMBED


def _describe_stream(block: Block, module: nn.Module, found: Trace, blocks: set[str]):
    """(key of the tower, layout, width, recorder of the grid) of a block."""
    call = found.calls[block.path]
    stream = call.streams[block.stream]
    shape, shapes = stream.shape, {each[block.stream] for each in call.all_shapes if len(each) > block.stream}
    if stream.found is not None and len({len(each) for each in shapes}) == 1:
        kind, _, prefix, origins = stream.found
        if kind in ("first", "last"):
            layout: Layout = ChannelsFirst() if kind == "first" else ChannelsLast()
            return kind, layout, shape[1] if kind == "first" else shape[3], None
        recorder = _recorder(block.path, origins, found, blocks)
        if len(shapes) == 1 and recorder is not None:
            return (recorder[0], prefix), Tokens(prefix), shape[2], recorder
    reason = _reason(shape, shapes, stream.found is not None)
    if len(shape) > 3 and shape[0] == BATCH and _channels_are_second(module, shape):
        return ("plain, first", reason), PlainFirst(reason), shape[1], None
    return ("plain", reason), Sequence(reason=reason), shape[-1], None


def _reason(shape: tuple[int, ...], shapes: set, proven: bool) -> str:
    if len(shapes) > 1:
        return "the block is called several times, on streams of different sizes"
    if proven:
        return "no module returns the map that its tokens come from, so that their grid is not known at run time"
    if len(shape) == 5 or shape[0] != BATCH:
        return f"streams of shape {('B', *shape[1:]) if shape[0] == BATCH else shape} are not maps"
    return "its positions cannot be proven to be a map in row order"


def _add_pixels(tower: Tower, model: nn.Module, found: Trace) -> None:
    tower.image_size = found.size[1:]
    if getattr(getattr(model, "patch_embed", None), "strict_img_size", False):
        tower.resizable = "strict_img_size=False or dynamic_img_size=True"
    elif (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        tower.resizable = "images of the size that they shall have with the frame, if it takes an img_size"
    if found.receiver is None:
        return
    module, width = model.get_submodule(found.receiver), tower.blocks[0].width
    image, stem = IMAGE, STEM
    if tower.embed is not None and tower.embed.path == found.receiver:
        image = stem = CHANNELS_FIRST_PIXELS if tower.embed.family is CHANNELS_FIRST_EMBED else CHANNELS_LAST_PIXELS
    tower.image = Site(found.receiver, module, image, width, tower=tower)
    if isinstance(module, nn.Conv2d):
        tower.stem = Site(found.receiver, module, stem, width, tower=tower)


def find_towers(model: nn.Module, pattern: str | None = None) -> Iterator[tuple[str, Tower]]:
    """Towers of an unknown network. pattern: regular expression of the block paths, instead of looking for them."""
    known = _look(model, pattern)
    paths = {block.path for block in known.blocks}
    towers: dict[object, Tower] = {}
    for block in known.blocks:
        module = model.get_submodule(block.path)
        key, layout, width, recorder = _describe_stream(block, module, known.trace, paths)
        if key not in towers:
            towers[key] = Tower(f"tower{len(towers)}" if towers else "vision", layout)
            if recorder is not None:
                source = model.get_submodule(recorder[0])
                towers[key].embed = Site(recorder[0], source, recorder[1], width, tower=towers[key])
        towers[key].add(block.path, module, _family(module, block.stream), width)
        towers[key].blocks[-1].uncalled = uncalled_layers(block.path, module, known.trace)
    for tower in towers.values():
        _add_pixels(tower, model, known.trace)
        yield "", tower
