"""ViTDet's simple feature pyramid (arXiv 2203.16527): maps of several strides out of a plain network's last one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.padding import Size, cut, frame_of, size_of
from deltalens.backbones.dense.token_maps import TokenMaps


class SimplePyramid(TokenMaps):
    """Strides 4, 8, 16, 32 from the last map of a ViT of patches of 16 px: by two deconvolutions (2x2, stride 2, with
    LayerNorm and GELU between them; each halves the channels), by one, as it is, and by max-pooling. Then for each
    stride a 1x1 and a 3x3 convolution without bias, each with a LayerNorm (eps 1e-6), as in the paper.

    Other patches: deconvolutions or poolings more or fewer. A patch whose side is no power of two (14 px) has its map
    resized to the nearest one (16 px) first, bilinearly, with every position where it was in the image.

    blocks: (-1,) for the last map, or one block for each stride, the finest first. out_channels: of every map.
    norms: of the maps taken, in front of all this; the paper has none there, because it trains the network.
    """

    def __init__(
        self,
        body: Body,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        norms: str | None = "auto",
        blocks: Sequence[int] = (-1,),
        out_channels: int = 256,
    ):
        strides = sorted(strides)
        wrong = [stride for stride in strides if stride < 1 or stride & (stride - 1)]
        if wrong or not strides:
            raise ValueError(f"strides must be powers of two, got {strides}")
        if len(blocks) not in (1, len(strides)):
            raise ValueError(f"blocks must be one, or one for each of the strides {strides}, got {list(blocks)}")
        blocks = list(blocks) * (len(strides) if len(blocks) == 1 else 1)
        super().__init__(body, blocks, norms, multiples=(max(strides),))
        self.multiple = max(strides)
        self.grid = 2 ** round(math.log2(self.stride))
        self.strides, self.channels = list(strides), [out_channels] * len(strides)
        self.levels = nn.ModuleList(_level(self.width, self.grid, stride, out_channels) for stride in strides)

    def padded_size(self, size: Size) -> Size:
        """The size of the images whose maps `padded_maps` gives."""
        return frame_of(size, self.fixed_size, self.multiple)

    def padded_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map for each stride, of the padded image."""
        size = self.padded_size(size_of(images))
        maps = [self._on_grid(each) for each in super().padded_maps(images)]
        found = zip(self.levels, maps, self.strides, strict=True)
        return [cut(level(each), size, stride) for level, each, stride in found]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map for each stride."""
        size = size_of(images)
        return [cut(each, size, stride) for each, stride in zip(self.padded_maps(images), self.strides, strict=True)]

    def _on_grid(self, feature_map: Tensor) -> Tensor:
        if self.grid == self.stride:
            return feature_map
        feature_map = F.pad(feature_map, (0, 1, 0, 1), mode="replicate")  # so that rounding down loses no position
        return F.interpolate(feature_map, scale_factor=self.stride / self.grid, mode="bilinear", align_corners=False)


def _level(width: int, grid: int, stride: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while grid > stride:
        layers += [LayerNorm2d(width), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        grid, width = grid // 2, width // 2
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(round(math.log2(stride / grid)))]
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
