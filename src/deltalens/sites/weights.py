"""Layers that an adapter changes from within: the `weights:<part>` slots.

A layer stays what it is; its swapped forward goes on from its own output y = layer(x), module by module, in the order
in which they were attached. There are two kinds:

* A module that adds is called with the layer's input x (..., in) and returns the change of the part's output
  (..., rows); `weight_change()` returns the same as a matrix (rows, in). For nn.Linear layers.
* A module with `transforms_output = True` is called with the part's output y (..., rows) and returns what takes its
  place; `merged(weight, bias)` returns weight (rows, n) and bias (rows,) of a layer that gives that at once. For
  every layer of `output_channels`. With `channelwise = True` each row depends on itself alone, and the module takes
  the rows that are asked for as a slice: f(y[..., rows], rows).

A fused projection counts as a layer: a module that holds q, k and v as its own parameters `in_proj_weight` (3 C, C) and
`in_proj_bias`, as nn.MultiheadAttention does. No forward of that module is swapped for it; the module is a caller.

A *caller* is a module whose own forward reads the weights of its layers instead of calling them. A family that can read
such a module so that the layers are called lists it in `Tower.callers`; it is swapped when one of its layers changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32
from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Family, Part, Site
from deltalens.sites.slots import ADAPTER_PREFIX, Slots
from deltalens.sites.swap import original_class, original_method, swap


class WeightSlots(Slots):
    """The slots of one layer, whose output has `channels` on the axis `axis` (1 or -1).

    rows: part -> its output rows, None for all. placed: (adapter, part, key) of every module, in attach order. A first
    convolution may hold modules of other slots (`stem.parallel`) beside them.
    """

    def __init__(self, layout, channels: int, axis: int):
        super().__init__(layout)
        self.channels, self.axis = channels, axis
        self.rows: dict[str, tuple[int, int] | None] = {}
        self.placed: list[tuple[str, str, str]] = []

    def put(self, slot: str, adapter: str, method: str, module: nn.Module) -> str:
        key = super().put(slot, adapter, method, module)
        self.placed.append((adapter, slot, key))
        return key

    def remove(self, adapter: str) -> None:
        super().remove(adapter)
        self.placed = [place for place in self.placed if place[0] != adapter]

    def forget_parts(self) -> None:
        """Drop the modules of all parts, and keep those of other slots."""
        for part in self.rows:
            self._modules.pop(part, None)
        self.placed = [place for place in self.placed if place[1] not in self.rows]

    def changes(self) -> list[tuple[int, int, nn.Module]]:
        """(first row, last row + 1, module) of the active modules, in the order in which they act."""
        found = []
        for name in self.active:
            for adapter, part, key in self.placed:
                if adapter == name and part in self.rows:
                    start, stop = self.rows[part] or (0, self.channels)
                    found.append((start, stop, self._modules[part][ADAPTER_PREFIX + name][key]))
        return found


def transforms_output(module: nn.Module) -> bool:
    """Whether a weight module reads the output of its layer instead of the input."""
    return getattr(module, "transforms_output", False)


def is_fused(layer: nn.Module) -> bool:
    """Whether a module holds q, k and v as parameters of its own, in one matrix."""
    return getattr(layer, "in_proj_weight", None) is not None


def _names(layer: nn.Module) -> tuple[str, str]:
    """What weight and bias of a layer are called."""
    return ("in_proj_weight", "in_proj_bias") if is_fused(layer) else ("weight", "bias")


def is_changed(layer: nn.Module) -> bool:
    """Whether a layer is more than its weight and bias: active modules sit in it, or peft's wrapper around it."""
    slots = layer._modules.get("delta")
    return bool(slots.changes()) if isinstance(slots, WeightSlots) else "base_layer" in layer._modules


# forward of a layer norm -> axis of its channels, or a function from the layer to it; families may add their library's
LAYER_NORM_AXIS: dict[Callable, int | Callable[[nn.Module], int]] = {
    cls.forward: -1 for cls in (nn.LayerNorm, LayerNorm, LayerNormFp32)
} | {cls.forward: 1 for cls in (LayerNorm2d, LayerNorm2dFp32)}


def output_channels(layer: nn.Module) -> tuple[int, int] | None:
    """(channels, their axis) of the output of a layer whose last step is weight * value + bias, None for others.

    These are nn.Linear, nn.Conv2d, fused projections, and the leaf norms: LayerNorm, LayerNorm2d, BatchNorm2d,
    GroupNorm. Layers that compute their weight (weight standardisation) or end with an activation are none of them.
    """
    if is_fused(layer):
        return len(layer.in_proj_weight), -1
    if getattr(layer, "weight", None) is None or any(name != "delta" for name, _ in layer.named_children()):
        return None
    forward = original_class(layer).forward
    if isinstance(layer, nn.Linear):
        return (layer.out_features, -1) if forward is nn.Linear.forward else None
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, 1) if forward is nn.Conv2d.forward else None
    if isinstance(layer, nn.LayerNorm):
        axis = LAYER_NORM_AXIS.get(forward)
        axis = axis(layer) if callable(axis) else axis
        return (layer.normalized_shape[0], axis) if axis and len(layer.normalized_shape) == 1 else None
    if isinstance(layer, nn.BatchNorm2d):
        return layer.num_features, 1
    return (layer.num_channels, 1) if isinstance(layer, nn.GroupNorm) else None


# ------------------------------------------------------------------ how a layer with weight modules reads
def _forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """A layer's own forward, then the weight modules in it."""
    y, slots = original_method(self, "forward")(x, *args, **kwargs), self.delta
    if slots.axis == -1:
        return _changed(slots, x, y, 0, slots.channels)
    return _changed(slots, x, y.movedim(1, -1), 0, slots.channels).movedim(-1, 1)


def _changed(slots: WeightSlots, x: Tensor, y: Tensor, low: int, high: int) -> Tensor:
    """What the active modules make of y, the rows low:high of layer(x), channels last."""
    for first, last, module in slots.changes():
        start, stop = max(first, low), min(last, high)
        if start >= stop:
            continue
        rows = slice(start - first, stop - first)
        part = y if stop - start == high - low else y[..., start - low : stop - low]
        if not transforms_output(module):
            part = part + module(x)[..., rows]
        elif getattr(module, "channelwise", False):
            part = module(part, rows)
        else:
            part = module(part)
        y = part if stop - start == high - low else torch.cat([y[..., : start - low], part, y[..., stop - low :]], -1)
    return y


LAYER = Family(name="deltalens.sites.weights:LAYER", methods={"forward": _forward}, innermost=True)


def linear_rows(layer: nn.Module, x: Tensor, start: int, stop: int, spliced: Tensor | None = None) -> Tensor:
    """Rows start:stop of layer(x), computing no others where the layer is an nn.Linear or a fused projection and no
    module mixes rows.

    spliced: a bias for all rows of a layer that has none, which its parent keeps apart (BEiT, EVA, Swin v2).
    """
    if not is_fused(layer) and original_class(layer) is not nn.Linear:
        y = layer(x)[..., start:stop]
        return y if spliced is None else y + spliced[start:stop]
    weight, bias = (getattr(layer, name) for name in _names(layer))
    bias = bias if spliced is None else spliced
    low, high = _rows_needed(layer, start, stop)
    y = F.linear(x, weight[low:high], None if bias is None else bias[low:high])
    if hasattr(layer, "delta"):
        y = _changed(layer.delta, x, y, low, high)
    return y[..., start - low : stop - low]


def _rows_needed(layer: nn.Module, low: int, high: int) -> tuple[int, int]:
    """low:high, widened to all rows of each module that mixes some of them."""
    mixing = [
        (first, last)
        for first, last, module in (layer.delta.changes() if hasattr(layer, "delta") else ())
        if transforms_output(module) and not getattr(module, "channelwise", False)
    ]
    for _ in mixing:  # each round settles at least one of them
        for first, last in mixing:
            if first < high and low < last:
                low, high = min(low, first), max(high, last)
    return low, high


# ------------------------------------------------------------------ placing and merging
def layer_of(block: nn.Module, part: Part) -> nn.Module:
    """The layer that a part belongs to, whatever it is."""
    return block.get_submodule(part.path) if part.path else block


def part_shape(block: nn.Module, part: Part) -> tuple[int, int]:
    """(outputs, inputs) of a part's matrix. A layer that is neither nn.Linear nor a fused projection is a TypeError."""
    layer = layer_of(block, part)
    if not isinstance(layer, nn.Linear) and not is_fused(layer):
        raise TypeError(f"{part.path} is a {type(layer).__name__}; weight methods change nn.Linear layers only")
    outputs, inputs = getattr(layer, _names(layer)[0]).shape
    start, stop = part.rows or (0, outputs)
    return stop - start, inputs


def check_fit(block: nn.Module, part: Part, module: nn.Module) -> None:
    """Raise TypeError where the layer of a part cannot hold this weight module."""
    if not transforms_output(module):
        part_shape(block, part)
    elif output_channels(layer := layer_of(block, part)) is None:
        raise TypeError(
            f"{part.path or 'the layer'} is a {type(layer).__name__}, which has no plain weight and bias at its end; "
            "methods that scale outputs change nn.Linear, nn.Conv2d and norm layers only"
        )


def equip(block: nn.Module, part: Part, layout) -> nn.Module:
    """Make the layer of a part ready to hold weight modules; returns the layer."""
    layer = layer_of(block, part)
    present = layer._modules.get("delta")
    if not isinstance(present, WeightSlots):
        shape = (layer.out_features, -1) if isinstance(layer, nn.Linear) else output_channels(layer)
        layer.delta = WeightSlots(layout, *shape)
        if present is not None:  # the slots of a first convolution
            layer.delta.active = present.active
            layer.delta._modules.update(present._modules)
    if not is_fused(layer):
        swap(layer, LAYER)
    return layer


def merge_changes(layer: nn.Module) -> None:
    """Fold the active modules of a layer into its weight and bias, in the order in which they act. A layer without a
    bias gets one where a module needs it."""
    weight_name, bias_name = _names(layer)
    weight = getattr(layer, weight_name)
    for start, stop, module in layer.delta.changes():
        if not transforms_output(module):
            weight[start:stop] += module.weight_change().to(weight.dtype)
            continue
        if getattr(layer, bias_name) is None:
            setattr(layer, bias_name, nn.Parameter(weight.new_zeros(layer.delta.channels)))
        rows, bias = weight[start:stop], getattr(layer, bias_name)[start:stop]
        new_rows, new_bias = module.merged(rows.reshape(stop - start, -1), bias)
        rows.copy_(new_rows.reshape(rows.shape))
        bias.copy_(new_bias)


def fold_affine(layer: nn.Module, matrix: Tensor, shift: Tensor) -> None:
    """Let a layer read M n + c instead of n, by its weight and bias alone: W <- W M, b <- b + W c."""
    weight_name, bias_name = _names(layer)
    weight, bias = getattr(layer, weight_name), getattr(layer, bias_name)
    precise = weight.to(matrix.dtype)
    moved = precise @ shift if bias is None else bias + precise @ shift
    weight.copy_(precise @ matrix)
    setattr(layer, bias_name, nn.Parameter(moved.to(weight.dtype)))


def is_plainly_linear(layer: nn.Module) -> bool:
    """Whether a layer is W x + b and nothing else."""
    return is_fused(layer) or original_class(layer) is nn.Linear


# ------------------------------------------------------------------ modules that read the weights of their layers
def caller_of(anatomy: Anatomy, path: str) -> Site | None:
    """The module that must be swapped so that the layer at a path is called."""
    for site in (site for tower in anatomy.towers for site in tower.callers):
        if path == site.path or path.startswith(f"{site.path}."):
            return site
    return None


def swap_caller(anatomy: Anatomy, path: str) -> None:
    """Make sure that the layer at a path is called."""
    if (site := caller_of(anatomy, path)) is not None:
        swap(site.module, site.family)


def refuse_unfit_target(anatomy: Anatomy, path: str, layer: nn.Module, wrapped: bool = False) -> None:
    """Raise for a layer, named by the user, where a weight change would be wrong, silent or pointless. wrapped: the
    change is a wrapper around the layer, which fused projections cannot have."""
    if any(path == head or path.startswith(head + ".") for head in anatomy.head_paths()):
        raise ValueError(f"{path} belongs to the head, which is trained as a whole anyway; leave it out of the targets")
    embeds = [tower.embed.path for tower in anatomy.towers if tower.embed is not None]
    if "patch_embed" in path.split(".") or any(path == e or path.startswith(e + ".") for e in embeds):
        raise ValueError(
            f"{path} is the patch embedding, hit by a target that names an ending; write the targets as a regular "
            r"expression of full paths, such as r'blocks\.\d+\.attn\.(qkv|proj)'"
        )
    parent = anatomy.model.get_submodule(path.rpartition(".")[0])
    if is_bypassed(anatomy, path):
        raise ValueError(
            f"{path} is never called: its parent {type(parent).__name__} reads the weight itself, so that a change of "
            "the layer would train nothing; leave it out of the targets"
        )
    if not isinstance(layer, nn.Linear) and (wrapped or not is_fused(layer)):
        rows = "; LoRAConfig and FacTConfig change its q, k and v" if is_fused(layer) else ""
        raise ValueError(f"{path} is a {type(layer).__name__}; LoRA changes nn.Linear layers only{rows}")


def is_bypassed(anatomy: Anatomy, path: str) -> bool:
    """Whether a layer's parent reads its weight instead of calling it, and no family knows how to call it."""
    if caller_of(anatomy, path) is not None:
        return False
    parent = anatomy.model.get_submodule(path.rpartition(".")[0])
    uncalled = any(f"{block.path}.{name}" == path for block in anatomy.blocks() for name in block.uncalled)
    return uncalled or isinstance(parent, nn.MultiheadAttention) or is_fused(anatomy.model.get_submodule(path))
