"""Convpass (Jie & Deng, arXiv 2207.07039): convolutional bypasses beside attention and MLP."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.sites.anatomy import Anatomy, require
from deltalens.sites.layout import Layout


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


class ConvpassLayer(nn.Module):
    """delta = s * up( dropout( a( conv3x3( a( down(n) ) ) ) ) ) with a(x) = x sigmoid(1.702 x), C -> h -> h -> C.

    The convolution has a bias and zero padding. A prefix token (class token, register, prompt) goes through it as an
    image of one pixel, so that it meets the kernel's centre only. down Xavier-uniform, up zero, biases zero: nothing is
    added at the start. The kernel starts as the identity, or Xavier-uniform.
    """

    takes_layout = True

    def __init__(
        self, dim: int, bottleneck: int = 8, scale: float = 1.0, dropout: float = 0.1, conv_init: str = "identity"
    ):
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.up = nn.Linear(bottleneck, dim)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        for layer in (self.down, self.conv, self.up):
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        if conv_init == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.dirac_(self.conv.weight)

    def forward(self, x: Tensor, n: Tensor, layout: Layout) -> Tensor:
        """The stream x is not read, only its norm n."""
        feature_map, prefix = layout.split(n)
        hidden = quick_gelu(self.down(feature_map))
        hidden = self._up(self.conv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        if prefix is not None:
            centre = self.conv.weight[:, :, 1, 1]
            prefix = self._up(F.linear(quick_gelu(self.down(prefix)), centre, self.conv.bias))
        return layout.join(hidden, prefix)

    def _up(self, hidden: Tensor) -> Tensor:
        return self.up(self.dropout(quick_gelu(hidden))) * self.scale


@register("convpass")
class ConvpassConfig(Method):
    """A bottleneck with a 3x3 convolution beside attention and MLP, on their normed input; head trained.

        x = x + attn(norm1 x) + P_1(norm1 x);  x = x + mlp(norm2 x) + P_2(norm2 x)

    The formula is `ConvpassLayer`'s. Parameters per layer: 2 C h + C + 9 h^2 + 2 h; ViT-B/16 327,552. The official code
    drops the bypass of a sample with a probability of its own where the backbone has drop-path; here drop-path acts on
    the frozen branches only. Streams without a map (text) and blocks without the slots (ConvNeXt) are a TypeError.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 3e-3

    bottleneck: int = setting(default=8, help="inner width h")
    scale: float = setting(default=1.0, help="factor s; the official code searches it per dataset in 0.01 to 100")
    dropout: float = setting(default=0.1, help="dropout before the up-projection")
    conv_init: str = setting(
        default="identity", help="start of the 3x3 kernel; official: per dataset", choices=("identity", "xavier")
    )
    branches: tuple[str, ...] = setting(
        default=("attention", "mlp"), help="branches that get a bypass; the official `convpass_attn` is attention only"
    )

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.branches or not set(self.branches) <= {"attention", "mlp"}:
            raise ValueError(f"branches must be some of attention, mlp, got {self.branches}")

    def place(self, anatomy: Anatomy):
        for block in anatomy.blocks():
            for branch in self.branches:
                require(block, f"{branch}.parallel", "Convpass", anatomy.model)
                if not block.tower.layout.has_map:
                    raise TypeError(
                        f"Convpass works on maps, and the stream of {block.path} ({type(block.module).__name__}) is a "
                        "plain sequence; adapt the vision tower only, or use LoRA, FacT or RepAdapter here"
                        + block.tower.layout.why_no_map()
                    )
                layer = ConvpassLayer(block.width, self.bottleneck, self.scale, self.dropout, self.conv_init)
                yield block, f"{branch}.parallel", layer
