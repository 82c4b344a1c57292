"""torchvision's Swin Transformer, versions 1 and 2: window attention on channels-last maps, prompts beside the map.

The attention is one function of the weights of `qkv` and `proj`, which are never called. `ATTENTION` calls them; it is
swapped in when one of them changes.

Version 2 is post-norm: x + norm1(attn(x)). What the frozen branch reads, the n of the equation, is x itself; prompts
become keys and values without a norm. Its attention is a cosine, so that keys of prompts are normalised like all
others. It ignores the bias of k: k = f(x) - f(0) for the layer f, whatever sits in it, so that merging stays exact.

Prompts that only serve as keys and values are shared by all windows and visible everywhere, with zero bias. Prompts
that live on (VPT-shallow, and the last block of VPT-deep, whose outputs the head pools) travel beside the map as the
pair (map, prompts): in a block each window attends with its own copy and the copies' outputs are averaged; in patch
merging they are tiled to 4 C channels. Where the blocks do not end in a SwinTransformer's own head, nobody would take
the prompts out again, and the blocks offer no `tokens` slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.unknown import UNKNOWN_BLOCK, input_size
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import ChannelsLast, Tokens
from deltalens.sites.output import changed_features, live, pooled
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import is_changed, linear_rows

MapAndPrompts = tuple[Tensor, Tensor]


# ------------------------------------------------------------------ window attention
def _is_cosine(attn: ShiftedWindowAttention) -> bool:
    return isinstance(attn, ShiftedWindowAttentionV2)


def _rows(attn: ShiftedWindowAttention, x: Tensor, first: int) -> Tensor:
    """q, k, v (first=0) or k, v (first=1) of x (B, N, C) as the library computes them, (3 or 2, B, heads, N, d)."""
    width = attn.qkv.in_features
    y = attn.qkv(x) if first == 0 else linear_rows(attn.qkv, x, width, 3 * width)
    if _is_cosine(attn):
        origin = linear_rows(attn.qkv, x.new_zeros(1, 1, width), width, 2 * width)
        start = (1 - first) * width
        y = torch.cat([y[..., :start], y[..., start : start + width] - origin, y[..., start + width :]], -1)
    return y.unflatten(-1, (3 - first, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def prompt_keys_values(block: SwinTransformerBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    k, v = _rows(block.attn, _norm_before(block)(prompts), 1)
    return k, v


def _regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which of the up to three pieces each row, or column, of a rolled map comes from."""
    place = torch.arange(length, device=device)
    return (place >= length - window).long() + (place >= length - shift).long() if shift else torch.zeros_like(place)


def _shift_mask(size: tuple[int, int], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """-100 between positions of a window that are no neighbours in the map: (windows, 1, N, N)."""
    rows, columns = (_regions(*axis, like.device) for axis in zip(size, window, shift, strict=True))
    region = rows[:, None] * 3 + columns
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2).flatten(0, 1)
    return (region[:, None] != region[:, :, None]).to(like.dtype).mul(-100.0).unsqueeze(1)


def _per_window(x: Tensor, windows: int) -> Tensor:
    """(1 or B, ...) -> (1 or B * windows, ...): windows are batch-major."""
    return x if x.shape[0] == 1 else x.repeat_interleave(windows, 0)


def _attend(
    attn: ShiftedWindowAttention, x: Tensor, keys_values: list, carried: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Shift, partition, attend, merge. x: the map that the attention reads (B, H, W, C); carried: prompts (B, p, C)
    that live on, or None. Returns the map's update and the carried prompts' update (None without)."""
    window, (batch, height, width, channels) = attn.window_size, x.shape
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = x.shape[1:3]
    shift = [0 if window[i] >= size[i] else attn.shift_size[i] for i in (0, 1)]
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    grid = (size[0] // window[0], size[1] // window[1])
    windows, area = grid[0] * grid[1], window[0] * window[1]
    tokens = x.reshape(batch, grid[0], window[0], grid[1], window[1], channels).transpose(2, 3)
    tokens, queries = tokens.reshape(-1, area, channels), 0
    if carried is not None:
        queries = carried.shape[1]
        tokens = torch.cat([carried.repeat_interleave(windows, 0), tokens], 1)
    q, k, v = _rows(attn, tokens, 0)
    for extra_k, extra_v in keys_values:
        k = torch.cat([_per_window(extra_k.to(k.dtype), windows).expand(len(k), -1, -1, -1), k], 2)
        v = torch.cat([_per_window(extra_v.to(v.dtype), windows).expand(len(v), -1, -1, -1), v], 2)
    bias = attn.get_relative_position_bias()
    if any(shift):
        bias = (bias + _shift_mask(size, window, shift, bias)).repeat(batch, 1, 1, 1)
    bias = F.pad(bias, (k.shape[2] - area, 0, queries, 0)).to(q.dtype)
    if _is_cosine(attn):  # attention() divides by sqrt(d)
        scale = torch.clamp(attn.logit_scale, max=math.log(100.0)).exp() * q.shape[-1] ** 0.5
        q, k = F.normalize(q, dim=-1) * scale.to(q.dtype), F.normalize(k, dim=-1)
    y = attention(q, k, v, bias, attn.attention_dropout if attn.training else 0.0, fused=True)
    y = F.dropout(attn.proj(y.transpose(1, 2).flatten(2)), attn.dropout, attn.training)
    prompt_update = None
    if carried is not None:
        prompt_update, y = y[:, :queries].unflatten(0, (batch, windows)).mean(1), y[:, queries:]
    y = y.reshape(batch, *grid, *window, channels).transpose(2, 3).reshape(batch, *size, channels)
    if any(shift):
        y = torch.roll(y, shift, (1, 2))
    return y[:, :height, :width].contiguous(), prompt_update


def _attention_forward(self: ShiftedWindowAttention, x: Tensor) -> Tensor:
    if is_changed(self.qkv) or is_changed(self.proj):
        return _attend(self, x, [], None)[0]
    return original_method(self, "forward")(x)


ATTENTION = Family(name="deltalens.backbones.torchvision.swin:ATTENTION", methods={"forward": _attention_forward})


# ------------------------------------------------------------------ blocks
def _is_post_norm(block: SwinTransformerBlock) -> bool:
    return isinstance(block, SwinTransformerBlockV2)


def _norm_before(block: SwinTransformerBlock):
    return _identity if _is_post_norm(block) else block.norm1


def _identity(x: Tensor) -> Tensor:
    return x


def _branches(block: SwinTransformerBlock, attend) -> tuple[Branch, Branch]:
    drop = block.stochastic_depth
    if _is_post_norm(block):
        return (
            Branch("attention", _identity, lambda n: block.norm1(attend(n)), drop),
            Branch("mlp", _identity, lambda n: block.norm2(block.mlp(n)), drop),
        )
    return Branch("attention", block.norm1, attend, drop), Branch("mlp", block.norm2, block.mlp, drop)


def _block_forward(self: SwinTransformerBlock, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    slots = self.delta

    def keys_values(normed: Tensor) -> list:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        return [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]

    def attend(normed: Tensor) -> Tensor:
        extra = keys_values(normed)
        return _attend(self.attn, normed, extra, None)[0] if extra else self.attn(normed)

    if not isinstance(x, tuple) and not slots.live("tokens.in"):
        return residual_block(slots, slots.layout, x, _branches(self, attend))

    feature_map = _map_of(x)
    height, width = feature_map.shape[1:3]
    tokens = feature_map.flatten(1, 2)
    tokens = torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens

    def attend_beside_prompts(normed: Tensor) -> Tensor:
        start = normed.shape[1] - height * width
        normed_map = normed[:, start:].unflatten(1, (height, width))
        if not start:
            return attend(normed_map).flatten(1, 2)
        update, prompt_update = _attend(self.attn, normed_map, keys_values(normed), normed[:, :start])
        return torch.cat([prompt_update, update.flatten(1, 2)], 1)

    layout = Tokens(prefix=0, grid=(height, width))
    tokens = residual_block(slots, layout, tokens, _branches(self, attend_beside_prompts))
    start = tokens.shape[1] - height * width
    feature_map = tokens[:, start:].unflatten(1, (height, width))
    return (feature_map, tokens[:, :start]) if start else feature_map  # `tokens.in` modules may add none


def _parts(block: SwinTransformerBlock) -> dict[str, Part]:
    width = _width(block)
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("attn.proj"), "fc1": Part("mlp.0"), "fc2": Part("mlp.3")}


def _width(block: SwinTransformerBlock) -> int:
    return block.attn.qkv.in_features


def _readers(block: SwinTransformerBlock) -> dict[str, tuple[str, ...]]:
    """Not of `attention.pre`: attention pads maps that windows do not divide, and qkv reads those zeros, too."""
    return {"mlp.pre": ("mlp.0",)}


BLOCK = Family(
    name="deltalens.backbones.torchvision.swin:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=_readers,
)
BLOCK_WITHOUT_HEAD = Family(
    name="deltalens.backbones.torchvision.swin:BLOCK_WITHOUT_HEAD",
    methods=BLOCK.methods,
    slots=BLOCK.slots - {"tokens.in", "tokens.out"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=_readers,
)


# ------------------------------------------------------------------ carriers of prompts between blocks
def _map_of(x: Tensor | MapAndPrompts) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def _merging_forward(self: PatchMerging | PatchMergingV2, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    merge = original_method(self, "forward")
    if not isinstance(x, tuple):
        return merge(x)
    feature_map, prompts = x
    tiled = prompts.repeat(1, 1, 4)
    norm_first = isinstance(self, PatchMerging)
    return merge(feature_map), (self.reduction(self.norm(tiled)) if norm_first else self.norm(self.reduction(tiled)))


def _forward(self: SwinTransformer, x: Tensor) -> Tensor:
    """The head pools map and prompts together, unless a `pool` module says otherwise."""
    images, x = x, self.features(x)
    if isinstance(x, tuple) or live(self, "pool"):
        feature_map = _map_of(x)
        tokens = feature_map.flatten(1, 2)
        tokens = self.norm(torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens)
        features = pooled(self, tokens, Tokens(prefix=0, grid=feature_map.shape[1:3]))
        features = tokens.mean(1) if features is None else features
    else:
        features = self.flatten(self.avgpool(self.permute(self.norm(x))))
    return self.head(changed_features(self, features, images))


MERGING = Family(name="deltalens.backbones.torchvision.swin:MERGING", methods={"forward": _merging_forward})
OWNER = Family(
    name="deltalens.backbones.torchvision.swin:OWNER",
    methods={"forward": _forward},
    slots=frozenset({"pool", "output"}),
)

_BLOCKS = {
    SwinTransformerBlock.forward: ShiftedWindowAttention.forward,
    SwinTransformerBlockV2.forward: ShiftedWindowAttentionV2.forward,
}


def _add_owner(tower: Tower, path: str, model: SwinTransformer) -> None:
    embed, start = model.features[0][0], path and f"{path}."
    tower.patch_size, tower.image_size = embed.kernel_size, input_size(model)[1:]
    tower.image = Site(f"{start}features.0.0", embed, IMAGE, embed.out_channels, tower=tower)
    tower.stem = Site(f"{start}features.0.0", embed, STEM, embed.out_channels, tower=tower)
    if original_class(model).forward is SwinTransformer.forward and hasattr(model.head, "in_features"):
        tower.classifier = Site(path, model, OWNER, model.head.in_features, tower=tower)
        tower.carriers.append(tower.classifier)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all Swin blocks in the tree."""
    tower = Tower("vision", ChannelsLast())
    for path, module in model.named_modules():
        if isinstance(module, SwinTransformer):
            _add_owner(tower, path, module)
        elif isinstance(module, SwinTransformerBlock):
            attn, forward = module.attn, original_class(module).forward
            if forward not in _BLOCKS or original_class(attn).forward is not _BLOCKS[forward]:
                tower.add(path, module, UNKNOWN_BLOCK, module.norm1.normalized_shape[0])
                tower.blocks[-1].uncalled = frozenset({"attn.qkv", "attn.proj"})
                continue
            tower.add(path, module, BLOCK, _width(module))
            tower.callers.append(Site(f"{path}.attn", attn, ATTENTION, _width(module), tower=tower))
        elif isinstance(module, (PatchMerging, PatchMergingV2)):
            tower.carriers.append(Site(path, module, MERGING, module.dim, tower=tower))
    if not tower.blocks:
        return
    if tower.classifier is None:
        tower.carriers.clear()
        for block in tower.blocks:
            block.family = BLOCK_WITHOUT_HEAD if block.family is BLOCK else block.family
    _add_grids(tower)
    yield "", tower


def _add_grids(tower: Tower) -> None:
    """The map of each block for images of the model's own size: a patch each, halved (rounded up) by every merging."""
    if tower.image_size is None:
        return
    grid, width = [side // patch for side, patch in zip(tower.image_size, tower.patch_size, strict=True)], None
    for block in tower.blocks:
        if width is not None and block.width > width:
            grid = [-(-side // 2) for side in grid]
        block.grid, width = (grid[0], grid[1]), block.width
