"""A plain fully convolutional head (Long et al., arXiv 1411.4038, as mmsegmentation writes it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.pyramid import STRIDES, make_pyramid
from deltalens.backbones.dense.segmentation import Segmenter, class_layer, conv_norm_relu


class FCNHead(nn.Module):
    """Maps resized to the finest one (bilinearly) and put side by side -> convolutions -> logits (B, K, h, w).

    levels: which maps are read. convs: how many 3x3 convolutions of `channels` outputs, each with BatchNorm and ReLU.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        levels: Sequence[int],
        channels: int,
        convs: int,
        dropout: float,
    ):
        super().__init__()
        self.levels = list(levels)
        width, layers = sum(widths[level] for level in levels), []
        for _ in range(convs):
            layers.append(conv_norm_relu(width, channels))
            width = channels
        self.convs, self.classify = nn.Sequential(*layers), class_layer(width, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        read = [maps[level] for level in self.levels]
        size = max((each.shape[-2:] for each in read), key=lambda shape: shape[0])
        resized = [_resized(each, size) for each in read]
        return self.classify(self.convs(torch.cat(resized, 1) if len(resized) > 1 else resized[0]))


def _resized(feature_map: Tensor, size: torch.Size) -> Tensor:
    if feature_map.shape[-2:] == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


def auxiliary_head(widths: Sequence[int], num_classes: int, channels: int = 256) -> FCNHead:
    """The auxiliary head of the recipes: one convolution on the last map but one (stride 16), dropout 0.1."""
    return FCNHead(widths, num_classes, levels=(max(len(widths) - 2, 0),), channels=channels, convs=1, dropout=0.1)


def build(
    body: Body,
    num_classes: int,
    *,
    levels: Sequence[int] | None = None,
    channels: int = 256,
    convs: int = 2,
    dropout: float = 0.1,
    norms: str | None = "auto",
    strides: Sequence[int] = STRIDES,
    blocks: Sequence[int] | None = None,
    pyramid_channels: int | None = None,
) -> Segmenter:
    """A backbone under an FCN head that reads all maps of its pyramid, or those of `levels` (0 is the finest).

    norms, strides, blocks, pyramid_channels: `make_pyramid`.
    """
    pyramid = make_pyramid(body, strides=strides, norms=norms, blocks=blocks, out_channels=pyramid_channels)
    count = len(pyramid.channels)
    chosen = list(range(count)) if levels is None else list(levels)
    wrong = [level for level in chosen if not -count <= level < count]
    if wrong or not chosen:
        raise ValueError(f"levels must lie between {-count} and {count - 1}, got {chosen}")
    if convs < 0:
        raise ValueError(f"convs must be at least 0, got {convs}")
    head = FCNHead(pyramid.channels, num_classes, chosen, channels, convs, dropout)
    return Segmenter(pyramid, head, num_classes)
