"""From a frozen backbone to a pyramid of maps, one rule for all networks.

A pyramid is a module with `backbone` (the timm network as it is), `channels` and `strides`. It takes images
(B, 3, H, W) of any size and returns one map (B, C_i, ceil(H / s_i), ceil(W / s_i)) for each stride s_i, the finest
first.
Images are padded to what the network takes (`padded_size`); `padded_maps` gives the maps before they are cut back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body, nchw
from deltalens.backbones.dense.norms import output_norms
from deltalens.backbones.dense.padding import Size, checked, cut, frame_of, padded, size_of

STRIDES = (4, 8, 16, 32)


def make_pyramid(
    body: Body,
    *,
    strides: Sequence[int] = STRIDES,
    norms: str | None = "auto",
    blocks: Sequence[int] | None = None,
    out_channels: int | None = None,
) -> nn.Module:
    """The pyramid of a network: its own maps where it is hierarchical, ViTDet's simple feature pyramid where it is not.

    strides: those that are wanted; a hierarchical network gives which of them it has. norms: `output_norms`. blocks,
    out_channels: of plain networks only, see `SimplePyramid`; the last block and 256 by default.
    """
    of_plain: dict[str, Any] = {
        key: value for key, value in (("blocks", blocks), ("out_channels", out_channels)) if value is not None
    }
    if body.plain:
        from deltalens.backbones.dense.simple_pyramid import SimplePyramid

        return SimplePyramid(body, strides=strides, norms=norms, **of_plain)
    if of_plain:
        raise ValueError(
            f"blocks and the pyramid's channels are chosen for plain networks such as ViTs, and {body.name} has maps "
            "of its own: leave them out"
        )
    return HierarchicalPyramid(body, strides=strides, norms=norms)


class HierarchicalPyramid(nn.Module):
    """The maps of a timm `features_only` network, channels first, each through a norm.

    Images are padded to a multiple of the largest stride, and the maps cut back.
    Raises ValueError where the network has no map of any of the strides.
    """

    backbone: Any

    def __init__(self, body: Body, *, strides: Sequence[int] = STRIDES, norms: str | None = "auto"):
        super().__init__()
        last = {stride: i for i, stride in enumerate(body.strides)}  # the last map of a stride is the deepest
        self.indices = [last[stride] for stride in sorted(strides) if stride in last]
        if not self.indices:
            raise ValueError(
                f"{body.name} has maps of the strides {list(body.strides)}, none of which is among {list(strides)}"
            )
        self.backbone = body.module
        self.channels = [body.channels[i] for i in self.indices]
        self.strides = [body.strides[i] for i in self.indices]
        self.norms = output_norms(norms, self.channels, body.module)
        self.fixed_size, self.multiple, self.name = body.fixed_size, body.multiple, body.name

    def padded_size(self, size: Size) -> Size:
        """What images of a size are padded to."""
        return frame_of(size, self.fixed_size, self.multiple)

    def padded_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map for each stride, of the padded image."""
        size = self.padded_size(checked(images, self.fixed_size, self.name))
        maps = self.backbone(padded(images, size))
        found = zip(self.indices, self.strides, self.norms, strict=True)
        return [norm(cut(nchw(maps[index], self.backbone), size, stride)) for index, stride, norm in found]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map for each stride."""
        size = size_of(images)
        return [cut(each, size, stride) for each, stride in zip(self.padded_maps(images), self.strides, strict=True)]
