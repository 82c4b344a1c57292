"""timm's Swin Transformer: window attention on channels-last maps, prompts beside the map.

Prompts that only serve as keys and values are shared by all windows and visible everywhere, with zero bias. Prompts
that live on (VPT-shallow, and the last block of VPT-deep, whose outputs the head pools) travel beside the map as the
pair (map, prompts): through blocks, where each window attends with its own copy and the copies' outputs are
averaged, and through patch merging, where they are tiled to 4 C channels as published.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import ChannelsLast, Tokens
from deltalens.sites.output import live, pooled, through_output
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import linear_rows

MapAndPrompts = tuple[Tensor, Tensor]


# ------------------------------------------------------------------ window attention with prompts
def prompt_keys_values(block: SwinTransformerBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    attn = block.attn
    width = attn.qkv.out_features // 3
    kv = linear_rows(attn.qkv, block.norm1(prompts), width, 3 * width)
    return kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _bias(block: SwinTransformerBlock, shifted: Tensor, windows: int, prompts: int, prompt_queries: int) -> Tensor:
    """Relative-position bias plus shift mask, zero for prompts: (1 or windows, heads, queries, keys)."""
    bias = block.attn._get_rel_pos_bias()
    mask = block.get_attn_mask(shifted) if getattr(block, "dynamic_mask", False) else block.attn_mask
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    return F.pad(bias, (prompts, 0, prompt_queries, 0))


def _attend(block: SwinTransformerBlock, x: Tensor, keys_values: list, carried: Tensor | None):
    """Shift, partition, attend, merge. x: normed map (B, H, W, C); carried: normed prompts (B, p, C) or None.

    Returns the map's update and the carried prompts' update (None without).
    """
    attn, size = block.attn, block.window_size
    batch, height, width, channels = x.shape
    shift = any(block.shift_size)
    if shift:
        x = torch.roll(x, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    x = F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    padded_height, padded_width = x.shape[1:3]
    tokens = window_partition(x, size).reshape(-1, block.window_area, channels)
    windows, queries = tokens.shape[0], 0
    if carried is not None:
        queries = carried.shape[1]
        copies = carried[:, None].expand(-1, windows // batch, -1, -1).reshape(windows, queries, channels)
        tokens = torch.cat([copies, tokens], 1)
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q = q.clone() if keys_values else q  # else backward would keep all of qkv beside the longer k and v
    for extra_k, extra_v in keys_values:
        k = torch.cat([_per_window(extra_k.to(k.dtype), batch, windows), k], 2)
        v = torch.cat([_per_window(extra_v.to(v.dtype), batch, windows), v], 2)
    bias = _bias(block, x, windows, k.shape[2] - block.window_area, queries).to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attention(q, k, v, bias, dropout, attn.fused_attn)
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    prompt_update = None
    if carried is not None:
        prompt_update = y[:, :queries].unflatten(0, (batch, -1)).mean(1)
        y = y[:, queries:]
    y = window_reverse(y.reshape(-1, *size, channels), size, padded_height, padded_width)[:, :height, :width]
    y = y.contiguous()
    return (torch.roll(y, block.shift_size, (1, 2)) if shift else y), prompt_update


def _per_window(x: Tensor, batch: int, windows: int) -> Tensor:
    """(1 or B, heads, p, d) -> (windows, heads, p, d); timm's windows are batch-major."""
    if x.shape[0] == 1:
        return x.expand(windows, -1, -1, -1)
    return x.repeat_interleave(windows // batch, 0)


def _branches(block: SwinTransformerBlock, attend) -> tuple[Branch, Branch]:
    return (
        Branch("attention", block.norm1, attend, block.drop_path1),
        Branch("mlp", block.norm2, block.mlp, block.drop_path2),
    )


def _block_forward(self: SwinTransformerBlock, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    slots = self.delta

    def keys_values(normed: Tensor) -> list:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        return [p if isinstance(p, tuple) else prompt_keys_values(self, p) for p in prompts]

    if not isinstance(x, tuple) and not slots.live("tokens.in"):

        def attend(normed: Tensor) -> Tensor:
            extra = keys_values(normed)
            return _attend(self, normed, extra, None)[0] if extra else self._attn(normed)

        return residual_block(slots, slots.layout, x, _branches(self, attend))

    feature_map = _map_of(x)
    height, width = feature_map.shape[1:3]
    tokens = feature_map.flatten(1, 2)
    tokens = torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens

    def attention_beside_prompts(normed: Tensor) -> Tensor:
        start, extra = normed.shape[1] - height * width, keys_values(normed)
        normed_map = normed[:, start:].unflatten(1, (height, width))
        if not start:
            update = _attend(self, normed_map, extra, None)[0] if extra else self._attn(normed_map)
            return update.flatten(1, 2)
        update, prompt_update = _attend(self, normed_map, extra, normed[:, :start])
        return torch.cat([prompt_update, update.flatten(1, 2)], 1)

    layout = Tokens(prefix=0, grid=(height, width))
    tokens = residual_block(slots, layout, tokens, _branches(self, attention_beside_prompts))
    start = tokens.shape[1] - height * width
    feature_map = tokens[:, start:].unflatten(1, (height, width))
    return (feature_map, tokens[:, :start]) if start else feature_map  # `tokens.in` modules may add none


def _parts(block: SwinTransformerBlock) -> dict[str, Part]:
    width = block.attn.qkv.out_features // 3
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("attn.proj"), "fc1": Part("mlp.fc1"), "fc2": Part("mlp.fc2")}


def _width(block: SwinTransformerBlock) -> int:
    return block.dim


def _may_pad(block: SwinTransformerBlock) -> bool:
    """Whether `_attn` may pad the normed map: the zeros are read by qkv beside what comes out of `attention.pre`."""
    sizes = zip(block.input_resolution, block.window_size, strict=True)
    return getattr(block, "dynamic_mask", False) or any(size % window for size, window in sizes)


BLOCK = Family(
    name="deltalens.backbones.timm.swin:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=lambda block: {"mlp.pre": ("mlp.fc1",)} | ({} if _may_pad(block) else {"attention.pre": ("attn.qkv",)}),
)


# ------------------------------------------------------------------ carriers of prompts between blocks
def _merging_forward(self: PatchMerging, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    merge = original_method(self, "forward")
    if not isinstance(x, tuple):
        return merge(x)
    feature_map, prompts = x
    return merge(feature_map), self.reduction(self.norm(prompts.repeat(1, 1, 4)))


def _map_of(x: Tensor | MapAndPrompts) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def _forward(self: SwinTransformer, x: Tensor) -> Tensor:
    """The head pools map and prompts together, as published, unless a `pool` module says otherwise."""
    images, x = x, self.layers(self.patch_embed(x))
    if isinstance(x, tuple) or live(self, "pool"):
        feature_map = _map_of(x)
        tokens = feature_map.flatten(1, 2)
        tokens = self.norm(torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens)
        features = pooled(self, tokens, Tokens(prefix=0, grid=feature_map.shape[1:3]))
        x = tokens.unsqueeze(1) if features is None else features[:, None, None]
    else:
        x = self.norm(x)
    if not live(self, "output"):
        return self.forward_head(x)
    return through_output(self, self.forward_head(x, pre_logits=True), images)


def _forward_features(self: SwinTransformer, x: Tensor) -> Tensor:
    return self.norm(_map_of(self.layers(self.patch_embed(x))))


def _forward_intermediates(
    self: SwinTransformer,
    x: Tensor,
    indices=None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
):
    """timm's method, without the prompts."""
    from timm.models._features import feature_take_indices

    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
    taken, last = feature_take_indices(len(self.layers), indices)
    intermediates, x = [], self.patch_embed(x)
    stages = self.layers[: last + 1] if stop_early else self.layers
    for i, stage in enumerate(stages):
        x = stage(x)
        if i in taken:
            tap = _map_of(x)
            tap = self.norm(tap) if norm and i == len(self.layers) - 1 else tap
            intermediates.append(tap.permute(0, 3, 1, 2).contiguous())
    if intermediates_only:
        return intermediates
    final = _map_of(x)
    return (self.norm(final) if i == len(self.layers) - 1 else final), intermediates


MERGING = Family(name="deltalens.backbones.timm.swin:MERGING", methods={"forward": _merging_forward})
OWNER = Family(
    name="deltalens.backbones.timm.swin:OWNER",
    methods={
        "forward": _forward,
        "forward_features": _forward_features,
        "forward_intermediates": _forward_intermediates,
    },
    slots=frozenset({"pool", "output"}),
)


def _add_pixels(tower: Tower, path: str, embed: PatchEmbed) -> None:
    tower.patch_size, tower.image_size = embed.patch_size, embed.img_size
    tower.resizable = "strict_img_size=False" if embed.strict_img_size else ""
    width = embed.proj.out_channels
    tower.image = Site(path, embed, IMAGE, width, tower=tower)
    tower.stem = Site(f"{path}.proj".lstrip("."), embed.proj, STEM, width, tower=tower)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all Swin blocks in the tree."""
    tower = Tower("vision", ChannelsLast())
    for path, module in model.named_modules():
        if isinstance(module, SwinTransformerBlock):
            cls = original_class(module)
            if cls.forward is SwinTransformerBlock.forward and type(module.attn).forward is WindowAttention.forward:
                tower.add(path, module, BLOCK, module.dim, tuple(module.input_resolution))
        elif isinstance(module, PatchMerging):
            tower.carriers.append(Site(path, module, MERGING, module.dim, tower=tower))
        elif isinstance(module, SwinTransformer):
            tower.classifier = Site(path, module, OWNER, module.num_features, tower=tower)
            tower.carriers.append(tower.classifier)
        elif isinstance(module, PatchEmbed) and tower.image is None:
            _add_pixels(tower, path, module)
    if tower.blocks:
        yield "", tower
