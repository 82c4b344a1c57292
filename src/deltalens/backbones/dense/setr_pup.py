"""SETR with progressive upsampling (Zheng et al., arXiv 2012.15840): VPT's setting on ADE20K."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.segmentation import Segmenter, class_layer, conv_norm_relu
from deltalens.backbones.dense.token_maps import TokenMaps, require_plain

AUXILIARY, DEPTH = (10, 15, 20), 24  # blocks, counted from 1, that the paper's auxiliary heads read in ViT-L


class ProgressiveUpsampling(nn.Module):
    """One map -> logits: steps of a 3x3 convolution (BatchNorm, ReLU) and bilinear upsampling, then a 1x1 convolution.

    level: which of the maps is read. steps, scale: four steps of twice the size make 16 times.
    """

    def __init__(self, width: int, num_classes: int, level: int, channels: int, steps: int, scale: int, dropout: float):
        super().__init__()
        self.level = level
        layers: list[nn.Module] = []
        for _ in range(steps):
            layers.append(conv_norm_relu(width, channels))
            layers.append(nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False))
            width = channels
        self.steps, self.classify = nn.Sequential(*layers), class_layer(width, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.steps(maps[self.level]))


def build(
    body: Body,
    num_classes: int,
    *,
    channels: int = 256,
    dropout: float = 0.0,
    blocks: Sequence[int] | None = None,
    auxiliary: bool = True,
    auxiliary_steps: int = 2,
    norms: str | None = "auto",
) -> Segmenter:
    """A ViT under SETR-PUP: four steps of twice the size on the last block's map, and auxiliary heads on three earlier
    ones: blocks 10, 15, 20 of 24, the nearest of another depth.

    blocks: (three for the auxiliary heads, one for the head), counted from 0. auxiliary_steps: convolutions of an
    auxiliary head, each before four times the size: 2 as in mmsegmentation's configuration for ADE20K, 1 as in its
    base. Each map has a LayerNorm, as in mmsegmentation's head.
    In training "aux" is a list of three logits; the paper weighs each of their losses with 0.4.
    Parameters with ViT-L and 150 classes: 13,143,640 (VPT's paper says 13.18 M; 11.37 M with auxiliary_steps=1).
    """
    require_plain(body, "setr_pup", "upernet or fcn")
    depth = len(body.strides)
    if blocks is None:
        blocks = [max(round(depth * block / DEPTH) - 1, 0) for block in AUXILIARY] + [depth - 1]
    if len(blocks) < 1 or auxiliary_steps < 1:
        raise ValueError(f"setr_pup needs at least one block and one step, got {list(blocks)}, {auxiliary_steps}")
    taken = list(blocks) if auxiliary else list(blocks)[-1:]
    maps = TokenMaps(body, taken, norms)
    head = ProgressiveUpsampling(maps.width, num_classes, -1, channels, steps=4, scale=2, dropout=dropout)
    further = [
        ProgressiveUpsampling(maps.width, num_classes, level, channels, auxiliary_steps, scale=4, dropout=dropout)
        for level in range(len(taken) - 1)
    ]
    return Segmenter(maps, head, num_classes, further)
