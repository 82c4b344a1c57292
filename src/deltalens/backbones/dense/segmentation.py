"""A segmentation network: a backbone's maps, a head that makes logits of them, auxiliary heads in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.dense.checkpointing import set_grad_checkpointing
from deltalens.backbones.dense.padding import Size, size_of


class Segmenter(nn.Module):
    """images (B, 3, H, W) -> {"out": logits (B, K, H, W)}, in training with "aux" besides where there are such heads:
    (B, K, H, W), or a list of them where there are several.

    maps: `padded_size(size)` and `padded_maps(images)`, maps of images that are padded to that size; holds the
    backbone. head, auxiliary: maps -> logits (B, K, h, w) of the padded image, h and w as the head wants.
    Logits are resized to the padded image's pixels bilinearly (align_corners=False); what was padded is cut off.
    """

    maps: Any
    adapted = "maps.backbone"

    def __init__(self, maps: nn.Module, head: nn.Module, num_classes: int, auxiliary: Sequence[nn.Module] = ()):
        super().__init__()
        self.maps, self.head, self.num_classes = maps, head, num_classes
        self.auxiliary = nn.ModuleList(auxiliary)

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        size = size_of(images)
        maps, frame = self.maps.padded_maps(images), self.maps.padded_size(size)
        found: dict[str, Tensor | list[Tensor]] = {"out": to_pixels(self.head(maps), frame, size)}
        if self.training and len(self.auxiliary):
            further = [to_pixels(head(maps), frame, size) for head in self.auxiliary]
            found["aux"] = further[0] if len(further) == 1 else further
        return found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in backward instead of keeping what they computed."""
        set_grad_checkpointing(self.get_submodule(self.adapted), enable)


def to_pixels(logits: Tensor, frame: Size, size: Size) -> Tensor:
    """Logits (B, K, h, w) of an image padded to `frame` -> (B, K, H, W) of the image's own pixels."""
    if tuple(logits.shape[-2:]) != tuple(frame):
        logits = F.interpolate(logits, size=frame, mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]


def class_layer(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout of channels, and a 1x1 convolution with small weights (std .01), as mmsegmentation's heads end."""
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def conv_norm_relu(width: int, channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
