"""Linear layers whose weight an adapter changes: the `weights:<part>` slots.

A layer stays the nn.Linear it is; its swapped forward adds what the active modules return for its rows. A weight
module is called with the layer's input x (..., in) and returns the change of the part's output (..., rows); its method
`weight_change()` returns the same as a matrix (rows, in), for merging.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Family, Part
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class, original_method, swap


def _live_parts(layer: nn.Linear) -> list[tuple[int, int, nn.Module]]:
    slots: Slots = layer.delta
    found = []
    for part, rows in slots.rows.items():
        start, stop = rows or (0, layer.out_features)
        found += [(start, stop, module) for module in slots.live(part)]
    return found


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    y = original_method(self, "forward")(x)
    for start, stop, module in _live_parts(self):
        y = _add_rows(y, module(x), start, stop)
    return y


def _add_rows(y: Tensor, change: Tensor, start: int, stop: int) -> Tensor:
    if stop - start == y.shape[-1]:
        return y + change
    return torch.cat([y[..., :start], y[..., start:stop] + change, y[..., stop:]], -1)


LINEAR = Family(name="deltalens.sites.weights:LINEAR", methods={"forward": _forward})


def linear_of(block: nn.Module, part: Part) -> nn.Linear:
    """The layer that a part belongs to. Other than nn.Linear is a TypeError."""
    layer = block.get_submodule(part.path) if part.path else block
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{part.path} is a {type(layer).__name__}; weight methods change nn.Linear layers only")
    return layer


def equip(block: nn.Module, part: Part, layout) -> nn.Linear:
    """Make the layer of a part ready to hold weight modules; returns the layer."""
    layer = linear_of(block, part)
    if not hasattr(layer, "delta"):
        layer.delta = Slots(layout)
        layer.delta.rows = {}
        swap(layer, LINEAR)
    return layer


def linear_rows(layer: nn.Linear, x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start:stop of layer(x), computing no others where the layer is a plain nn.Linear."""
    if original_class(layer) is not nn.Linear:
        return layer(x)[..., start:stop]
    bias = None if layer.bias is None else layer.bias[start:stop]
    y = F.linear(x, layer.weight[start:stop], bias)
    if hasattr(layer, "delta"):
        for first, last, module in _live_parts(layer):
            low, high = max(first, start), min(last, stop)
            if low < high:
                change = module(x)[..., low - first : high - first]
                y = _add_rows(y, change, low - start, high - start)
    return y


def refuse_unfit_target(anatomy: Anatomy, path: str, layer: nn.Module) -> None:
    """Raise for a layer, named by the user, where a weight change would be wrong, silent or pointless."""
    if any(path == head or path.startswith(head + ".") for head in anatomy.head_paths()):
        raise ValueError(f"{path} belongs to the head, which is trained as a whole anyway; leave it out of the targets")
    embeds = [tower.embed.path for tower in anatomy.towers if tower.embed is not None]
    if "patch_embed" in path.split(".") or any(path == e or path.startswith(e + ".") for e in embeds):
        raise ValueError(
            f"{path} is the patch embedding, hit by a target that names an ending; write the targets as a regular "
            r"expression of full paths, such as r'blocks\.\d+\.attn\.(qkv|proj)'"
        )
    parent = anatomy.model.get_submodule(path.rpartition(".")[0])
    uncalled = any(f"{block.path}.{name}" == path for block in anatomy.blocks() for name in block.uncalled)
    if uncalled or isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{path} is never called: its parent {type(parent).__name__} reads the weight itself, so that a change of "
            "the layer would train nothing; leave it out of the targets"
        )
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{path} is a {type(layer).__name__}; LoRA changes nn.Linear layers only")
