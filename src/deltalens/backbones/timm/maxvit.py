"""timm's MaxViT, CoAtNet and MaxxViT: every residual block is a site, also those inside a `MaxxVitBlock`.

* `MbConvBlock`: one pre-norm branch of convolutions, "mlp". With a stride its skip is a shortcut of another shape.
* `ConvNeXtBlock` (timm has a copy here): as in `deltalens.backbones.timm.convnext`.
* `TransformerBlock2d` (CoAtNet): attention over the whole map, then an MLP, on maps (B, C, H, W). With a stride the
  first skip is a shortcut, and nothing can read x beside it.
* `PartitionAttentionCl`, `PartitionAttention2d` (MaxViT): attention in windows or on a grid, then an MLP, on maps
  (B, H, W, C) or (B, C, H, W). `ParallelPartitionAttention` does both at once and takes no prompts.

Prompts become keys and values, shared by all windows, with zero relative-position bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    ConvNeXtBlock,
    MaxxVit,
    MbConvBlock,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
    grid_partition,
    grid_partition_nchw,
    grid_reverse,
    grid_reverse_nchw,
    window_partition,
    window_partition_nchw,
    window_reverse,
    window_reverse_nchw,
)
from torch import Tensor, nn

from deltalens.backbones.timm.maps import (
    OUTPUT_ONLY,
    TWO_BRANCHES,
    as_map,
    attend,
    attend_map,
    find_tower,
    one_branch,
    prompted,
    split_map,
    unknown_like,
)
from deltalens.sites.anatomy import Family, Part, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.layout import ChannelsLast
from deltalens.sites.swap import original_class

_CHANNELS_LAST = ChannelsLast()
_PARTITIONS = {  # class, whether in windows -> (partition, reverse)
    (PartitionAttentionCl, True): (window_partition, window_reverse),
    (PartitionAttentionCl, False): (grid_partition, grid_reverse),
    (PartitionAttention2d, True): (window_partition_nchw, window_reverse_nchw),
    (PartitionAttention2d, False): (grid_partition_nchw, grid_reverse_nchw),
}


# ------------------------------------------------------------------ blocks of convolutions
def _mbconv_forward(self: MbConvBlock, x: Tensor) -> Tensor:
    def body(normed: Tensor) -> Tensor:
        u = self.conv2_kxk(self.norm1(self.conv1_1x1(self.down(normed))))
        u = self.norm2(u if self.se_early is None else self.se_early(u))
        return self.conv3_1x1(u if self.se is None else self.se(u))

    branch = Branch("mlp", self.pre_norm, body, self.drop_path, self.shortcut)
    return residual_block(self.delta, self.delta.layout, x, (branch,))


def _convnext_forward(self: ConvNeXtBlock, x: Tensor) -> Tensor:
    """shortcut(x) + drop_path(inner(ls(mlp(pre(norm(dwconv(x))))))), then stream."""
    slots, maps = self.delta, self.use_conv_mlp
    inside = slots.layout if maps else _CHANNELS_LAST
    u = self.conv_dw(self.down(x))
    u = self.norm(u if maps else u.permute(0, 2, 3, 1))
    u = slots.chain("mlp.inner", self.ls(self.mlp(slots.chain("mlp.pre", u, inside))), inside)
    u = u if maps else u.permute(0, 3, 1, 2)
    return slots.chain("block.stream", self.drop_path(u) + self.shortcut(x), slots.layout)


# ------------------------------------------------------------------ blocks with attention
def prompt_keys_values(block: nn.Module, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, d)."""
    attn = block.attn
    if isinstance(attn, AttentionCl):
        return _split(attn, attn.qkv(block.norm1(prompts)))[1:]
    return split_map(attn, attn.qkv(block.norm1(as_map(prompts))))[1:]


def _split(attn: AttentionCl, qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, N, 3 * heads * d) -> q, k, v (B, heads, N, d)."""
    if attn.head_first:
        return qkv.unflatten(-1, (attn.num_heads, 3 * attn.dim_head)).transpose(1, 2).chunk(3, -1)
    return qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend_windows(attn: AttentionCl, windows: Tensor, keys_values: list, bias: Tensor | None) -> Tensor:
    """timm's AttentionCl.forward with further keys and values. windows: (B * windows, h, w, C), normed."""
    y = attend(attn, *_split(attn, attn.qkv(windows.flatten(1, 2))), keys_values, bias)
    y = y.transpose(1, 2).flatten(2).unflatten(1, windows.shape[1:3])
    return attn.proj_drop(attn.proj(y))


def _partitioned(block: nn.Module, normed: Tensor, keys_values: list) -> Tensor:
    """`_partition_attn` with further keys and values."""
    last = isinstance(block, PartitionAttentionCl)
    kind = PartitionAttentionCl if last else PartitionAttention2d
    partition, reverse = _PARTITIONS[kind, block.partition_block]
    windows, bias = partition(normed, block.partition_size), _bias(block.attn)
    windows = (_attend_windows if last else attend_map)(block.attn, windows, keys_values, bias)
    return reverse(windows, block.partition_size, normed.shape[1:3] if last else normed.shape[2:4])


def _bias(attn: nn.Module) -> Tensor | None:
    return None if attn.rel_pos is None else attn.rel_pos.get_bias()


def _mlp_branch(block: nn.Module) -> Branch:
    return Branch("mlp", block.norm2, lambda normed: block.ls2(block.mlp(normed)), block.drop_path2)


def _partition_forward(self: nn.Module, x: Tensor) -> Tensor:
    slots = self.delta

    def attention(normed: Tensor) -> Tensor:
        extra = prompted(slots, normed, lambda prompts: prompt_keys_values(self, prompts))
        return self.ls1(_partitioned(self, normed, extra) if extra else self._partition_attn(normed))

    branches = (Branch("attention", self.norm1, attention, self.drop_path1), _mlp_branch(self))
    return residual_block(slots, slots.layout, x, branches)


def _transformer_forward(self: TransformerBlock2d, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    slots = self.delta

    def attention(normed: Tensor) -> Tensor:
        extra = prompted(slots, normed, lambda prompts: prompt_keys_values(self, prompts))
        if not extra:
            return self.ls1(self.attn(normed, shared_rel_pos=shared_rel_pos))
        bias = shared_rel_pos if self.attn.rel_pos is None else _bias(self.attn)
        return self.ls1(attend_map(self.attn, normed, extra, bias))

    first = Branch("attention", self.norm1, attention, self.drop_path1, self.shortcut)
    return residual_block(slots, slots.layout, x, (first, _mlp_branch(self)))


# ------------------------------------------------------------------ families
def _width(block: nn.Module) -> int:
    if isinstance(block, MbConvBlock):
        return block.conv3_1x1.out_channels
    layer = block.mlp.fc2
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _parts(block: nn.Module) -> dict[str, Part]:
    """The linear layers, in blocks on channels-last maps. Where qkv is ordered by heads, its parts are no ranges of
    rows, and it is offered as a whole, as "qkv"."""
    parts, attn = {}, getattr(block, "attn", None)
    if isinstance(attn, AttentionCl):
        width = attn.num_heads * attn.dim_head
        parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
        parts = {"qkv": Part("attn.qkv")} if attn.head_first else parts
        parts["proj"] = Part("attn.proj")
    return parts | {n: Part(f"mlp.{n}") for n in ("fc1", "fc2") if isinstance(getattr(block.mlp, n), nn.Linear)}


MBCONV = Family(
    name="deltalens.backbones.timm.maxvit:MBCONV",
    methods={"forward": _mbconv_forward},
    slots=one_branch("mlp"),
    width=_width,
)
MBCONV_DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.maxvit:MBCONV_DOWNSAMPLING",
    methods={"forward": _mbconv_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)
CONVNEXT = Family(
    name="deltalens.backbones.timm.maxvit:CONVNEXT",
    methods={"forward": _convnext_forward},
    slots=OUTPUT_ONLY | {"mlp.pre"},
    parts=_parts,
    width=_width,
    readers=lambda block: {"mlp.pre": ("mlp.fc1",)},
)
TRANSFORMER = Family(
    name="deltalens.backbones.timm.maxvit:TRANSFORMER",
    methods={"forward": _transformer_forward},
    slots=TWO_BRANCHES | {"attention.prompts"},
    width=_width,
    keys_values=prompt_keys_values,
)
TRANSFORMER_DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.maxvit:TRANSFORMER_DOWNSAMPLING",
    methods={"forward": _transformer_forward},
    slots=TWO_BRANCHES - {"attention.pre", "attention.parallel", "block.parallel"},
    width=_width,
)
PARTITION = Family(
    name="deltalens.backbones.timm.maxvit:PARTITION",
    methods={"forward": _partition_forward},
    slots=TWO_BRANCHES | {"attention.prompts"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": ("attn.qkv",), "mlp.pre": ("mlp.fc1",)},
    layout=_CHANNELS_LAST,
)
PARTITION_OF_MAP = Family(
    name="deltalens.backbones.timm.maxvit:PARTITION_OF_MAP",
    methods={"forward": _partition_forward},
    slots=TWO_BRANCHES | {"attention.prompts"},
    width=_width,
    keys_values=prompt_keys_values,
)
PARALLEL_PARTITION = Family(
    name="deltalens.backbones.timm.maxvit:PARALLEL_PARTITION",
    methods={"forward": _partition_forward},
    slots=TWO_BRANCHES,
    parts=_parts,
    width=_width,
    readers=lambda block: {"attention.pre": ("attn_block.qkv", "attn_grid.qkv"), "mlp.pre": ("mlp.fc1",)},
    layout=_CHANNELS_LAST,
)


def _mbconv(block: MbConvBlock) -> Family:
    return MBCONV if isinstance(block.shortcut, nn.Identity) else MBCONV_DOWNSAMPLING


def _transformer(block: TransformerBlock2d) -> Family:
    return TRANSFORMER if isinstance(block.shortcut, nn.Identity) else TRANSFORMER_DOWNSAMPLING


def _with_attention(family_of: Callable[[nn.Module], Family], attention: type) -> Callable[[nn.Module], Family]:
    """The family, or the unknown one where the block's attention has a forward of its own."""

    def checked(block: nn.Module) -> Family:
        family = family_of(block)
        return family if original_class(block.attn).forward is attention.forward else unknown_like(family)

    return checked


_KINDS = {
    MbConvBlock: _mbconv,
    ConvNeXtBlock: lambda block: CONVNEXT,
    TransformerBlock2d: _with_attention(_transformer, Attention2d),
    PartitionAttentionCl: _with_attention(lambda block: PARTITION, AttentionCl),
    PartitionAttention2d: _with_attention(lambda block: PARTITION_OF_MAP, Attention2d),
    ParallelPartitionAttention: lambda block: PARALLEL_PARTITION,
}


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all residual blocks in the tree, in order of execution."""
    for tower in find_tower(model, _KINDS, _width):
        owner = next((module for module in model.modules() if isinstance(module, MaxxVit)), None)
        tower.image_size = owner.img_size if owner is not None else tower.image_size
        tower.resizable = "another backbone, because windows and relative positions are made for this size"
        yield "", tower
