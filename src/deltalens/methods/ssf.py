"""SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823): scale and shift the output of every layer."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, Family, Part, Site
from deltalens.sites.weights import is_bypassed, output_channels


class SSFLayer(nn.Module):
    """y' = scale * y + shift for each channel: scale ~ N(1, std^2), shift ~ N(0, std^2)."""

    transforms_output = True
    channelwise = True
    pointwise = True

    def __init__(self, channels: int, std: float = 0.02):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels).normal_(1, std))
        self.shift = nn.Parameter(torch.empty(channels).normal_(0, std))

    def forward(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """y (..., channels), or only the given rows of it. Computed in the parameters' precision, returned in y's."""
        return torch.addcmul(self.shift[rows], y, self.scale[rows]).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (channels, n) and bias (channels,) of the layer that gives the scaled and shifted output."""
        return weight * self.scale[:, None], bias * self.scale + self.shift


@register("ssf")
class SSFConfig(Method):
    """y' = scale * op(x) + shift after every linear layer, convolution and norm of the backbone; head trained.

    On a ViT that is the patch embedding, in each block norm1, qkv, proj, norm2, fc1 and fc2, and the final norm.
    Parameters: 2 per output channel of each such layer; ViT-B/16 205,824. Merging is exact: weights and biases take it
    all, and layers without a bias get one. std=0 starts as the backbone; 0.02 is the official code's.

    The layers between the stages of Swin and ConvNeXt are left alone (`exclude`): the official code is written to scale
    them too, but as released never does. Where a model pools before its last norm (mean-pooled ViT, ConvNeXt), the
    official code scales the features before the pooling and not that norm; here the norm is scaled, which merges.
    Layers whose parent reads the weight itself are passed over.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 5e-3

    std: float = setting(default=0.02, help="standard deviation of the initial scales and shifts")
    exclude: str | None = setting(
        default=r"(layers|stages)\.\d+\.downsample\..*",
        help="regular expression of the paths of layers to leave alone",
    )

    def __post_init__(self):
        if self.std < 0:
            raise ValueError(f"std must not be negative, got {self.std}")

    def place(self, anatomy: Anatomy):
        owners = {path.rpartition(".")[0] for path, _ in anatomy.backbone_parameters()}
        for path, layer in anatomy.model.named_modules():
            shape = output_channels(layer) if path in owners else None
            if shape is None or is_bypassed(anatomy, path) or self._excludes(anatomy.canonical(path)):
                continue
            yield Site(path, layer, _LAYER, shape[0]), "weights:all", SSFLayer(shape[0], self.std)

    def _excludes(self, path: str) -> bool:
        return self.exclude is not None and re.fullmatch(self.exclude, path) is not None


_LAYER = Family(name="deltalens.methods.ssf:_LAYER", methods={}, parts=lambda layer: {"all": Part("")})
