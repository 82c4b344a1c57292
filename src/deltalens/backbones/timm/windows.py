"""What timm's three Swin networks share: shifted windows on channels-last maps, and prompts carried beside the map.

Prompts that only serve as keys and values are shared by all windows and visible everywhere, with zero bias. Prompts
that live on (VPT-shallow, and the last block of VPT-deep, whose outputs the head pools) travel beside the map as the
pair (map, prompts): through blocks, where each window attends with its own copy and the copies' outputs are
averaged, and through patch merging, where they are tiled to 4 C channels as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.output import live, pooled, through_output
from deltalens.sites.swap import original_method

MapAndPrompts = tuple[Tensor, Tensor]


def map_of(x: Tensor | MapAndPrompts) -> Tensor:
    """The map of a stream that may carry prompts."""
    return x[0] if isinstance(x, tuple) else x


# ------------------------------------------------------------------ a block
def in_windows(
    block: nn.Module, x: Tensor, carried: Tensor | None, attend: Callable[[Tensor, Tensor | None, int], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Shift, partition, attend, merge. x: what attention reads (B, H, W, C); carried: prompts (B, p, C) or None.

    attend: (tokens (windows, p + area, C), shift mask (windows of a map, area, area) or None, p) -> tokens.
    Returns the map's update and the carried prompts' update (None without).
    """
    size = block.window_size
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
    mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
    y = attend(tokens, mask, queries)
    prompt_update = None
    if carried is not None:
        prompt_update = y[:, :queries].unflatten(0, (batch, -1)).mean(1)
        y = y[:, queries:]
    y = window_reverse(y.reshape(-1, *size, channels), size, padded_height, padded_width)[:, :height, :width]
    y = y.contiguous()
    return (torch.roll(y, block.shift_size, (1, 2)) if shift else y), prompt_update


def per_window(x: Tensor, windows: int) -> Tensor:
    """(1 or B, heads, p, d) -> (windows, heads, p, d); timm's windows are batch-major."""
    if x.shape[0] == 1:
        return x.expand(windows, -1, -1, -1)
    return x.repeat_interleave(windows // x.shape[0], 0)


def prompt_pairs(
    block: nn.Module, normed: Tensor, keys_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of every module in `attention.prompts`."""
    prompts = [module(normed) for module in block.delta.live("attention.prompts")]
    return [p if isinstance(p, tuple) else keys_values(block, p) for p in prompts]


def block_forward(
    block: nn.Module,
    x: Tensor | MapAndPrompts,
    branches: Callable[[Callable[[Tensor], Tensor]], Sequence[Branch]],
    attend: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> Tensor | MapAndPrompts:
    """The equation on a map, or on a map and the prompts beside it.

    branches: the block's branches, given what attention makes of the stream. attend: (map, carried prompts or None) ->
    the updates of both.
    """
    slots = block.delta
    if not isinstance(x, tuple) and not slots.live("tokens.in"):
        return residual_block(slots, slots.layout, x, branches(lambda read: attend(read, None)[0]))

    feature_map = map_of(x)
    height, width = feature_map.shape[1:3]
    tokens = feature_map.flatten(1, 2)
    tokens = torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens

    def beside_prompts(read: Tensor) -> Tensor:
        start = read.shape[1] - height * width
        read_map = read[:, start:].unflatten(1, (height, width))
        update, prompt_update = attend(read_map, read[:, :start] if start else None)
        update = update.flatten(1, 2)
        return update if prompt_update is None else torch.cat([prompt_update, update], 1)

    tokens = residual_block(slots, Tokens(prefix=0, grid=(height, width)), tokens, branches(beside_prompts))
    start = tokens.shape[1] - height * width
    feature_map = tokens[:, start:].unflatten(1, (height, width))
    return (feature_map, tokens[:, :start]) if start else feature_map  # `tokens.in` modules may add none


def may_pad(block: nn.Module, resolution: tuple[int, int]) -> bool:
    """Whether window attention may pad what it reads: qkv then reads zeros beside what comes out of `attention.pre`."""
    sizes = zip(resolution, block.window_size, strict=True)
    return getattr(block, "dynamic_mask", False) or any(size % window for size, window in sizes)


def post_norm_branches(block: nn.Module, attend: Callable[[Tensor], Tensor]) -> tuple[Branch, Branch]:
    """The branches of a Swin v2 block, x + norm(branch(x)): what the frozen branch reads is x itself."""

    def mlp(read: Tensor) -> Tensor:
        return block.norm2(block.mlp(read.flatten(1, -2))).view(read.shape)  # as timm flattens it, bit for bit

    return (
        Branch("attention", _itself, lambda read: block.norm1(attend(read)), block.drop_path1),
        Branch("mlp", _itself, mlp, block.drop_path2),
    )


def _itself(x: Tensor) -> Tensor:
    return x


def parts(block: nn.Module) -> dict[str, Part]:
    """The linear parts of a block of any of these networks."""
    width = block.attn.qkv.out_features // 3
    found = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return found | {"proj": Part("attn.proj"), "fc1": Part("mlp.fc1"), "fc2": Part("mlp.fc2")}


def readers(block: nn.Module, resolution: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """Which layers read what comes out of `pre` slots: qkv too, unless the library pads the map behind that slot."""
    return {"mlp.pre": ("mlp.fc1",)} | ({} if may_pad(block, resolution) else {"attention.pre": ("attn.qkv",)})


def merging_forward(self: nn.Module, x: Tensor | MapAndPrompts) -> Tensor | MapAndPrompts:
    """Patch merging as the library has it; prompts are tiled to 4 C channels, as published, and normed and reduced."""
    merge = original_method(self, "forward")
    if not isinstance(x, tuple):
        return merge(x)
    feature_map, prompts = x
    return merge(feature_map), self.reduction(self.norm(prompts.repeat(1, 1, 4)))


# ------------------------------------------------------------------ the network around the blocks
def _forward(self: nn.Module, x: Tensor) -> Tensor:
    """The head pools map and prompts together, as published, unless a `pool` module says otherwise."""
    images, x = x, self.layers(self.patch_embed(x))
    if isinstance(x, tuple) or live(self, "pool"):
        feature_map = map_of(x)
        tokens = feature_map.flatten(1, 2)
        tokens = self.norm(torch.cat([x[1], tokens], 1) if isinstance(x, tuple) else tokens)
        features = pooled(self, tokens, Tokens(prefix=0, grid=feature_map.shape[1:3]))
        x = tokens.unsqueeze(1) if features is None else features[:, None, None]
    else:
        x = self.norm(x)
    if not live(self, "output"):
        return self.forward_head(x)
    return through_output(self, self.forward_head(x, pre_logits=True), images)


def _forward_features(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(map_of(self.layers(self.patch_embed(x))))


def _forward_intermediates(
    self: nn.Module,
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
            tap = map_of(x)
            tap = self.norm(tap) if norm and i == len(self.layers) - 1 else tap
            intermediates.append(tap.permute(0, 3, 1, 2).contiguous())
    if intermediates_only:
        return intermediates
    final = map_of(x)
    return (self.norm(final) if i == len(self.layers) - 1 else final), intermediates


OWNER = Family(
    name="deltalens.backbones.timm.windows:OWNER",
    methods={
        "forward": _forward,
        "forward_features": _forward_features,
        "forward_intermediates": _forward_intermediates,
    },
    slots=frozenset({"pool", "output"}),
)


def add_pixels(tower: Tower, path: str, embed: PatchEmbed) -> None:
    """The pixel slots of a patch embedding."""
    tower.patch_size, tower.image_size = embed.patch_size, embed.img_size
    tower.resizable = "strict_img_size=False" if embed.strict_img_size else ""
    width = embed.proj.out_channels
    tower.image = Site(path, embed, IMAGE, width, tower=tower)
    tower.stem = Site(f"{path}.proj".lstrip("."), embed.proj, STEM, width, tower=tower)
