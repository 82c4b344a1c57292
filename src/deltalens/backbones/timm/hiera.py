"""timm's Hiera: tokens in nested order, attention inside mask units, stages that begin with a pooling block.

Tokens of one pooling window lie in equal places of consecutive parts of the sequence, so that pooling is a maximum over
the first axis of a view; the order (`Unrolled`) unwinds from stage to stage. Modules that want a map get the true one.

A block whose width changes projects and pools x itself, on the way of the shortcut:

    n = norm1(x);  x <- shortcut(x, n) + drop_path(inner(ls1(attn(pre(n) ; prompts))));  x <- stream(x)

There x and n have other lengths and widths, so it offers no `attention.parallel` and no `block.parallel`; `pre` and
prompts are as wide as the block's input. The shortcut's projection reads n, not pre(n).

Prompts are keys and values of every mask unit; Hiera has no relative positions. As tokens they would belong to no mask
unit, so no block offers `tokens.in`: VPT-shallow does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Layout, Sequence
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows


# ------------------------------------------------------------------ the order of the tokens
class Unrolled(Layout):
    """(B, N, C) tokens of a map (H, W), in the order that strides (y_1, x_1), .. (y_k, x_k) leave.

    The token of row h = ((h' y_k + a_k) .. ) y_1 + a_1, and of column w likewise with b, is at
    (a_1, b_1, .., a_k, b_k, h', w').
    Each pooling removes the first stride. The number of tokens says how many are left.

    size: (H, W) of the first block's map. strides: of all that are left there. poolings: how many of them are used up.
    """

    def __init__(self, size: tuple[int, int], strides: list[tuple[int, int]], poolings: int):
        self.of_length: dict[int, tuple[tuple[int, int], list[tuple[int, int]]]] = {}
        for used in range(poolings + 1):
            self.of_length[size[0] * size[1]] = size, strides
            if used < poolings:
                size, strides = (size[0] // strides[0][0], size[1] // strides[0][1]), strides[1:]

    def split(self, x):
        if x.shape[1] not in self.of_length:
            raise RuntimeError(
                f"{x.shape[1]} tokens are none of the maps of this network ({', '.join(map(str, self.of_length))}): "
                "masks and patch dropout remove mask units, which methods with spatial modules cannot work with; set "
                "patch_drop_rate=0"
            )
        (height, width), strides = self.of_length[x.shape[1]]
        count = len(strides)
        inner = [side for stride in strides for side in stride]
        rows, columns = [*range(2 * count - 1, 0, -2)], [*range(2 * count, 0, -2)]  # of a_k .. a_1 and b_k .. b_1
        x = x.reshape(x.shape[0], *inner, height // math.prod(inner[::2]), width // math.prod(inner[1::2]), x.shape[-1])
        x = x.permute(0, 2 * count + 1, *rows, 2 * count + 2, *columns, 2 * count + 3)
        return x.reshape(x.shape[0], height, width, x.shape[-1]), None

    def join(self, feature_map, prefix):
        height, width = feature_map.shape[1:3]
        strides = self.of_length[height * width][1]
        count = len(strides)
        of_rows, of_columns = [y for y, _ in reversed(strides)], [x for _, x in reversed(strides)]
        x = feature_map.unflatten(2, (width // math.prod(of_columns), *of_columns))
        x = x.unflatten(1, (height // math.prod(of_rows), *of_rows))  # (B, h', a_k .. a_1, w', b_k .. b_1, C)
        pairs = [axis for i in range(count) for axis in (1 + count - i, 2 + 2 * count - i)]
        return x.permute(0, *pairs, 1, 2 + count, 3 + 2 * count).flatten(1, -2)


# ------------------------------------------------------------------ attention in mask units
def prompt_keys_values(block: HieraBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, width of the input) -> keys and values, each (1 or B, heads, p, head_dim)."""
    attn = block.attn
    kv = linear_rows(attn.qkv, block.norm1(prompts), attn.dim_out, 3 * attn.dim_out)
    return kv.unflatten(-1, (2, attn.heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attn: MaskUnitAttention, x: Tensor, keys_values: list) -> Tensor:
    """timm's MaskUnitAttention.forward with further keys and values, the same ones in every mask unit."""
    units = x.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
    qkv = attn.qkv(x).unflatten(-1, (3, attn.heads, attn.head_dim)).unflatten(1, (-1, units))
    q, k, v = qkv.permute(3, 0, 4, 2, 1, 5).unbind(0)  # (B, heads, units, tokens, head_dim)
    q = q.unflatten(3, (attn.q_stride, -1)).amax(3) if attn.q_stride > 1 else q.clone()
    for extra_k, extra_v in keys_values:
        k = torch.cat([_in_units(extra_k, k), k], 3)
        v = torch.cat([_in_units(extra_v, v), v], 3)
    if units == 1:  # four axes, so that every kernel takes them
        y = attention(q.squeeze(2), k.squeeze(2), v.squeeze(2), None, 0.0, attn.fused_attn).unsqueeze(2)
    else:
        y = attention(q, k, v, None, 0.0, attn.fused_attn)
    return attn.proj(y.transpose(1, 3).flatten(3).flatten(1, 2))


def _in_units(x: Tensor, like: Tensor) -> Tensor:
    """(1 or B, heads, p, d) -> (B, heads, units, p, d)."""
    return x.to(like.dtype).unsqueeze(2).expand(like.shape[0], -1, like.shape[2], -1, -1)


def _shortcut(block: HieraBlock, x: Tensor, normed: Tensor) -> Tensor:
    """What a block that changes the width adds its attention to: pooled over the q_stride parts."""
    if block.proj is not None:
        return block.proj(normed).unflatten(1, (block.attn.q_stride, -1)).amax(1)
    parts = x.unflatten(1, (block.attn.q_stride, -1))
    return torch.cat([parts.amax(1), parts.mean(1)], -1)


def _block_forward(self: HieraBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        pairs = [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]
        return self.ls1(_attend(self.attn, normed, pairs) if pairs else self.attn(normed))

    def mlp(normed: Tensor) -> Tensor:
        return self.ls2(self.mlp(normed))

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path1),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    if self.do_expand:
        return expanding_block(slots, x, *branches, lambda x, normed: _shortcut(self, x, normed))
    return residual_block(slots, slots.layout, x, branches)


def expanding_block(
    slots: Slots, x: Tensor, attention: Branch, mlp: Branch, shortcut: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A block whose width changes. shortcut: (x, norm1(x)) -> what attention's output is added to."""
    layout, normed = slots.layout, attention.norm(x)
    update = attention.body(slots.chain("attention.pre", normed, layout))
    update = attention.drop_path(slots.chain("attention.inner", update, layout))
    x = slots.chain("attention.stream", shortcut(x, normed) + update, layout)
    return residual_block(slots, layout, x, (mlp,))


def _parts(block: HieraBlock) -> dict[str, Part]:
    width = block.attn.dim_out
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    parts |= {"proj": Part("attn.proj"), "fc1": Part("mlp.fc1"), "fc2": Part("mlp.fc2")}
    return parts if block.proj is None else parts | {"expand": Part("proj")}


SLOTS = (RESIDUAL_BLOCK_SLOTS - {"tokens.in", "tokens.out"}) | {"attention.prompts"}
EXPANDING_SLOTS = SLOTS - {"attention.parallel", "block.parallel"}


def input_widths(block: nn.Module) -> dict[str, int]:
    """The slots before the width changes."""
    return {"attention.pre": block.dim, "attention.prompts": block.dim}


_COMMON = {
    "methods": {"forward": _block_forward},
    "parts": _parts,
    "width": lambda block: block.dim_out,
    "keys_values": prompt_keys_values,
    "readers": lambda block: {"attention.pre": ("attn.qkv",), "mlp.pre": ("mlp.fc1",)},
}
BLOCK = Family(name="deltalens.backbones.timm.hiera:BLOCK", slots=SLOTS, **_COMMON)
POOLING_BLOCK = Family(
    name="deltalens.backbones.timm.hiera:POOLING_BLOCK",
    slots=EXPANDING_SLOTS,
    widths=input_widths,
    **_COMMON,
)


def _family(block: HieraBlock) -> Family:
    known = original_class(block).forward is HieraBlock.forward
    if not known or original_class(block.attn).forward is not MaskUnitAttention.forward:
        return UNKNOWN_BLOCK
    return POOLING_BLOCK if block.do_expand else BLOCK


def _layout(owner: Hiera) -> Layout:
    """Of images; videos have no map (H, W)."""
    size, strides = owner.unroll.size, owner.unroll.schedule
    if len(size) != 2:
        return Sequence()
    poolings = sum(block.attn.q_stride > 1 for block in owner.blocks)
    return Unrolled(tuple(size), [tuple(stride) for stride in strides], poolings)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the network, tower) for every Hiera in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, Hiera) or not len(owner.blocks):
            continue
        layout = _layout(owner)
        tower, grids = Tower("vision", layout), [None]
        if isinstance(layout, Unrolled):
            grids = [size for size, _ in layout.of_length.values()]
        stage = 0
        for i, block in enumerate(owner.blocks):
            stage += block.attn.q_stride > 1
            tower.add(f"blocks.{i}", block, _family(block), block.dim_out, grids[stage] if len(grids) > 1 else grids[0])
        conv = owner.patch_embed.proj
        if isinstance(conv, nn.Conv2d):
            width = conv.out_channels
            tower.image = Site("patch_embed", owner.patch_embed, IMAGE, width, tower=tower)
            tower.stem = Site("patch_embed.proj", conv, STEM, width, tower=tower)
            tower.patch_size = tuple(conv.stride)
            tower.image_size = tuple(side * stride for side, stride in zip(owner.unroll.size, conv.stride, strict=True))
            tower.resizable = "position embeddings for other sizes, which Hiera does not have"
        yield path, tower
