"""timm's ConvNeXt v1 and v2: one residual branch, convolution first, so there is no norm(x) for parallel modules."""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from deltalens.backbones.timm.maps import find_tower
from deltalens.sites.anatomy import Family, Part, Tower
from deltalens.sites.layout import ChannelsLast

_CHANNELS_LAST = ChannelsLast()


def _block_forward(self: ConvNeXtBlock, x: Tensor) -> Tensor:
    """x + drop_path(inner(gamma * mlp(pre(norm(dwconv(x)))))), then stream. `pre` and `inner` see channels last."""
    slots = self.delta
    inside = slots.layout if self.use_conv_mlp else _CHANNELS_LAST
    u = self.conv_dw(x)
    u = u if self.use_conv_mlp else u.permute(0, 2, 3, 1)
    u = self.mlp(slots.chain("mlp.pre", self.norm(u), inside))
    if self.gamma is not None:
        u = u * (self.gamma.reshape(1, -1, 1, 1) if self.use_conv_mlp else self.gamma)
    u = slots.chain("mlp.inner", u, inside)
    u = u if self.use_conv_mlp else u.permute(0, 3, 1, 2)
    return slots.chain("block.stream", self.drop_path(u) + self.shortcut(x), slots.layout)


def _parts(block: ConvNeXtBlock) -> dict[str, Part]:
    return {name: Part(f"mlp.{name}") for name in ("fc1", "fc2") if isinstance(getattr(block.mlp, name), nn.Linear)}


def _width(block: ConvNeXtBlock) -> int:
    return block.conv_dw.out_channels


BLOCK = Family(
    name="deltalens.backbones.timm.convnext:BLOCK",
    methods={"forward": _block_forward},
    slots=frozenset({"mlp.pre", "mlp.inner", "block.stream"}),
    parts=_parts,
    width=_width,
    readers=lambda block: {"mlp.pre": ("mlp.fc1",)},
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all ConvNeXt blocks in the tree."""
    for tower in find_tower(model, {ConvNeXtBlock: lambda block: BLOCK}, _width):
        yield "", tower
