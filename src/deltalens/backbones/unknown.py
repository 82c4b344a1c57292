"""The fallback for networks that no family knows: repeated blocks found from the tree, one slot at their output.

A module is a sequence of blocks when its children are of one class that is not a torch.nn primitive and all give the
same output shape in one forward of fake tensors (stages, whose outputs differ, are descended into).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from deltalens.backbones.pixels import IMAGE, STEM, read_pixels
from deltalens.backbones.preprocessing import PREPROCESSING_KEY
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.layout import ChannelsFirst, ChannelsLast, Layout, Sequence, Tokens
from deltalens.sites.swap import original_class, original_method

MOST_PREFIX_TOKENS = 16


# ------------------------------------------------------------------ how unknown blocks read
def _block_forward(self: nn.Module, *args, **kwargs):
    """stream(block(...)): applied to the output, or to its first element where a block returns a tuple."""
    slots = self.delta
    y = original_method(self, "forward")(*args, **kwargs)
    if torch.is_tensor(y):
        return slots.chain("block.stream", y, slots.layout)
    return (slots.chain("block.stream", y[0], slots.layout), *y[1:])


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
    methods={"forward": _block_forward},
    slots=frozenset({"block.stream"}),
)
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


# ------------------------------------------------------------------ one forward of fake tensors
class _Trace:
    """Output shapes by path, in order of execution, and the innermost module that received the input first."""

    def __init__(self, size: tuple[int, int, int]):
        self.size = size
        self.input: torch.Tensor | None = None
        self.receiver: str | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.maps: list[tuple[str, tuple[int, ...]]] = []
        self.maps_before: dict[str, int] = {}

    def before(self, path: str, module: nn.Module, args: tuple) -> None:
        self.maps_before.setdefault(path, len(self.maps))
        is_leaf = all(name == "delta" for name, _ in module.named_children())
        if self.receiver is None and is_leaf and args and args[0] is self.input:
            self.receiver = path

    def after(self, path: str, output) -> None:
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if torch.is_tensor(output):
            self.shapes.setdefault(path, tuple(output.shape))
            if output.dim() == 4:
                self.maps.append((path, tuple(output.shape)))


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


def _trace(model: nn.Module) -> _Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode

    trace, handles, modes = _Trace(input_size(model)), [], {m: m.training for m in model.modules()}
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, path=path: trace.before(path, m, args)))
        handles.append(module.register_forward_hook(lambda m, args, y, path=path: trace.after(path, y)))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            trace.input = torch.empty(2, *trace.size)
            model.eval()(trace.input)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} is of no known family, and a trial forward with an input of shape "
            f"{(2, *trace.size)} failed, so that its blocks cannot be described: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return trace


# ------------------------------------------------------------------ blocks and their layout
def _is_primitive(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules") or cls.__module__.startswith("torch.nn.intrinsic")


def _block_containers(model: nn.Module, trace: _Trace) -> list[list[tuple[str, nn.Module]]]:
    found: list[list[tuple[str, nn.Module]]] = []
    singles: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, path: str) -> None:
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        if children:
            classes = {original_class(child) for _, child in children}
            shapes = {trace.shapes.get(child_path) for child_path, _ in children}
            alike = len(classes) == 1 and not _is_primitive(*classes) and any(True for _ in children[0][1].parameters())
            if alike and len(shapes) == 1 and None not in shapes:
                (found if len(children) > 1 else singles).append(children)
                if len(children) > 1:
                    return
        for child_path, child in children:
            walk(child, child_path)

    walk(model, "")
    classes = Counter(original_class(child) for children in found for _, child in children)
    inside = [path for children in found for path, _ in children]
    for children in singles:  # a stage with a single block of a class that other stages repeat
        path, child = children[0]
        if original_class(child) in classes and not any(path.startswith(other + ".") for other in inside):
            found.append(children)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda children: order[children[0][0]])


def _channels_are_last(block: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a 4-D output is (B, H, W, C): by which axis the block's own layers agree with."""
    first = sum(m.out_channels == shape[1] for m in block.modules() if isinstance(m, nn.Conv2d))
    first += sum(m.num_features == shape[1] for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    last = sum(m.normalized_shape == (shape[3],) for m in block.modules() if isinstance(m, nn.LayerNorm))
    last += sum(m.out_features == shape[3] for m in block.modules() if isinstance(m, nn.Linear))
    return last > first or (last == first and shape[1] == shape[2] and shape[3] != shape[2])


def _grid_source(path: str, tokens: int, trace: _Trace, blocks: set[str]) -> tuple[str, Family, int] | None:
    """(path, family, prefix) of the latest 4-D output before a block, and outside all blocks, that accounts for its
    tokens."""
    for source, shape in reversed(trace.maps[: trace.maps_before[path]]):
        parents = source.split(".")
        if any(".".join(parents[:i]) in blocks for i in range(1, len(parents) + 1)):
            continue
        for family, (height, width) in ((CHANNELS_FIRST_EMBED, shape[2:4]), (CHANNELS_LAST_EMBED, shape[1:3])):
            if 0 <= tokens - height * width <= MOST_PREFIX_TOKENS:
                return source, family, tokens - height * width
    return None


def _describe_stream(path: str, block: nn.Module, trace: _Trace, blocks: set[str]):
    """(key of the tower, layout, width, grid source) of a block."""
    shape = trace.shapes[path]
    if len(shape) == 4:
        last = _channels_are_last(block, shape)
        layout: Layout = ChannelsLast() if last else ChannelsFirst()
        return type(layout), layout, shape[3] if last else shape[1], None
    if len(shape) != 3:
        return None
    source = _grid_source(path, shape[1], trace, blocks)
    layout = Sequence() if source is None else Tokens(prefix=source[2])
    return source, layout, shape[-1], source


def _uncalled(path: str, block: nn.Module, trace: _Trace) -> frozenset[str]:
    """Linear layers that the block's forward went around, as Swin v2 does with qkv to splice in its biases."""
    layers = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return frozenset(name for name in layers if f"{path}.{name}" not in trace.maps_before)


def _add_pixels(tower: Tower, model: nn.Module, trace: _Trace) -> None:
    tower.image_size = trace.size[1:]
    if getattr(getattr(model, "patch_embed", None), "strict_img_size", False):
        tower.resizable = "strict_img_size=False or dynamic_img_size=True"
    if trace.receiver is None:
        return
    module, width = model.get_submodule(trace.receiver), tower.blocks[0].width
    image, stem = IMAGE, STEM
    if tower.embed is not None and tower.embed.path == trace.receiver:
        image = stem = CHANNELS_FIRST_PIXELS if tower.embed.family is CHANNELS_FIRST_EMBED else CHANNELS_LAST_PIXELS
    tower.image = Site(trace.receiver, module, image, width, tower=tower)
    if isinstance(module, nn.Conv2d):
        tower.stem = Site(trace.receiver, module, stem, width, tower=tower)


def find_towers(model: nn.Module, pattern: str | None = None) -> Iterator[tuple[str, Tower]]:
    """Towers of an unknown network. pattern: regular expression of the block paths, instead of looking for them."""
    trace = _trace(model)
    if pattern is None:
        blocks = [pair for children in _block_containers(model, trace) for pair in children]
    else:
        blocks = [(path, m) for path, m in model.named_modules() if re.fullmatch(pattern, path)]
    paths = {path for path, _ in blocks}
    towers: dict[object, Tower] = {}
    for path, block in blocks:
        stream = _describe_stream(path, block, trace, paths) if path in trace.shapes else None
        if stream is None:
            continue
        key, layout, width, source = stream
        if key not in towers:
            towers[key] = Tower(f"tower{len(towers)}" if towers else "vision", layout)
            if source is not None:
                embed = model.get_submodule(source[0])
                towers[key].embed = Site(source[0], embed, source[1], width, tower=towers[key])
        towers[key].add(path, block, UNKNOWN_BLOCK, width)
        towers[key].blocks[-1].uncalled = _uncalled(path, block, trace)
    for tower in towers.values():
        _add_pixels(tower, model, trace)
        yield "", tower
