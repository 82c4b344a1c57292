"""What families of networks on maps share: the tower with its stem, the sets of slots, attention over maps.

Blocks come in three kinds. Where the skip is the identity, all slots of the equation are there; where the block has no
norm of its own, n is x. Where the skip goes through a shortcut of another shape, modules that read x do not fit beside
the branch: what sits on the branch's output (`inner`) and on the block's (`stream`) is left. Where there is no skip,
`inner` acts on the block's output too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.unknown import UNKNOWN_BLOCK, input_size
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import BRANCH_SLOTS, RESIDUAL_BLOCK_SLOTS
from deltalens.sites.layout import ChannelsFirst, ChannelsLast
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class

TWO_BRANCHES = RESIDUAL_BLOCK_SLOTS - {"tokens.in", "tokens.out"}
OUTPUT_ONLY = frozenset({"mlp.inner", "block.stream"})


def one_branch(name: str) -> frozenset[str]:
    """The slots of a block with one residual branch and an identity skip."""
    return frozenset(f"{name}.{slot}" for slot in BRANCH_SLOTS) | {"block.parallel", "block.stream"}


def identity(x: Tensor) -> Tensor:
    """The norm of a branch that has none, the drop path of a block without one."""
    return x


def block_without_skip(slots: Slots, name: str, y: Tensor) -> Tensor:
    """block.stream(inner(y)) for the output y of a block that adds nothing to its input."""
    return slots.chain("block.stream", slots.chain(f"{name}.inner", y, slots.layout), slots.layout)


# ------------------------------------------------------------------ attention with prompts as extra keys and values
def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, keys_values: list, bias: Tensor | None = None) -> Tensor:
    """Attention of timm's layer (`attn_drop`, `fused_attn`) with further keys and values.

    q, k, v: (B * windows, heads, N, d), batch-major. keys_values: pairs (1 or B, heads, p, d), the same in all windows
    of an image. bias: additive, (1, heads, N, N), zero for prompts. Returns (B * windows, heads, N, d).
    """
    length = k.shape[2]
    q = q.clone()  # else backward would keep all of qkv beside the longer k and v
    for extra_k, extra_v in keys_values:
        k = torch.cat([_per_window(extra_k.to(k.dtype), k.shape[0]), k], 2)
        v = torch.cat([_per_window(extra_v.to(v.dtype), v.shape[0]), v], 2)
    if bias is not None:
        bias = F.pad(bias, (k.shape[2] - length, 0)).to(q.dtype)
    return attention(q, k, v, bias, attn.attn_drop.p if attn.training else 0.0, attn.fused_attn)


def _per_window(x: Tensor, count: int) -> Tensor:
    if x.shape[0] == 1:
        return x.expand(count, -1, -1, -1)
    return x if x.shape[0] == count else x.repeat_interleave(count // x.shape[0], 0)


def as_map(prompts: Tensor) -> Tensor:
    """(1 or B, p, C) -> (1 or B, C, p, 1), for layers that read channels-first maps."""
    return prompts.transpose(1, 2).unsqueeze(-1)


def split_map(attn: nn.Module, qkv: Tensor) -> tuple[Tensor, ...]:
    """What the qkv convolution of an `Attention2d` gives, (B, 3 * heads * d, H, W) -> q, k, v (B, heads, H * W, d)."""
    shape = (attn.num_heads, 3 * attn.dim_head) if attn.head_first else (3, attn.num_heads, attn.dim_head)
    parts = qkv.flatten(2).unflatten(1, shape)
    parts = parts.chunk(3, 2) if attn.head_first else parts.unbind(1)
    return tuple(part.transpose(-1, -2) for part in parts)


def attend_map(attn: nn.Module, x: Tensor, keys_values: list, bias: Tensor | None = None) -> Tensor:
    """The forward of an `Attention2d` of timm with further keys and values. x: (B, C, H, W), normed."""
    y = attend(attn, *split_map(attn, attn.qkv(x)), keys_values, bias)
    return attn.proj_drop(attn.proj(y.transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[-2:])))


def prompted(slots: Slots, normed: Tensor, keys_values_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list:
    """Keys and values of the active prompts of a block; empty without."""
    prompts = [module(normed) for module in slots.live("attention.prompts")]
    return [each if isinstance(each, tuple) else keys_values_of(each) for each in prompts]


# ------------------------------------------------------------------ the tower and its stem
def add_pixels(tower: Tower, model: nn.Module) -> None:
    """The slots for pixels, at the stem's first convolution: the first one outside the blocks.

    A convolution that pads or weighs in a way of its own receives the image but offers no `stem.parallel`.
    """
    blocks = tuple(f"{block.path}." for block in tower.blocks)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "delta" not in path.split(".") and not path.startswith(blocks):
            tower.image = Site(path, module, IMAGE, module.out_channels, tower=tower)
            if original_class(module).forward is nn.Conv2d.forward:
                tower.stem = Site(path, module, STEM, module.out_channels, tower=tower)
            tower.image_size = input_size(model)[1:]
            return


UNKNOWN_CHANNELS_FIRST = Family(
    name="deltalens.backbones.timm.maps:UNKNOWN_CHANNELS_FIRST",
    methods=UNKNOWN_BLOCK.methods,
    slots=UNKNOWN_BLOCK.slots,
    layout=ChannelsFirst(),
)
UNKNOWN_CHANNELS_LAST = Family(
    name="deltalens.backbones.timm.maps:UNKNOWN_CHANNELS_LAST",
    methods=UNKNOWN_BLOCK.methods,
    slots=UNKNOWN_BLOCK.slots,
    layout=ChannelsLast(),
)
_UNKNOWN = {ChannelsFirst: UNKNOWN_CHANNELS_FIRST, ChannelsLast: UNKNOWN_CHANNELS_LAST}


def unknown_like(family: Family) -> Family:
    """The family of an unknown block whose stream looks as it does in `family`."""
    return _UNKNOWN.get(type(family.layout), UNKNOWN_BLOCK)


def find_tower(
    model: nn.Module, kinds: Mapping[type, Callable[[nn.Module], Family]], width: Callable[[nn.Module], int]
) -> Iterator[Tower]:
    """One tower of all blocks of some classes, in the order in which they are registered; none where no block has the
    forward of one of these classes.

    kinds: class -> block -> family. A subclass with a forward of its own counts as unknown. width: block -> channels.
    """
    tower, known = Tower("vision", ChannelsFirst()), False
    for path, module in model.named_modules():
        kind = next((base for base in original_class(module).__mro__ if base in kinds), None)
        if kind is None or "delta" in path.split("."):
            continue
        reads = original_class(module).forward is kind.forward
        family = kinds[kind](module)
        tower.add(path, module, family if reads else unknown_like(family), width(module))
        known |= reads
    if known:
        add_pixels(tower, model)
        yield tower
