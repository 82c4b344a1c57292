"""Mona's three earlier designs, for the ablation that led to the published one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.mona_layer import MonaConv


class _EarlierMona(nn.Module):
    """What the three share: y = x + project2(dropout(GELU(bottleneck(project1(x))))), x (B, H, W, C)."""

    spatial = True
    reduce: Literal["mean", "sum"]

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        kernels: tuple[int, ...] = (3, 5, 7),
        dropout: float = 0.1,
        init: Literal["official", "identity"] = "official",
    ):
        super().__init__()
        self.project1 = nn.Linear(dim, bottleneck)
        self.adapter_conv = MonaConv(bottleneck, kernels, self.reduce)
        self.project2 = nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.project1, self.project2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if init == "identity":
            nn.init.zeros_(self.project2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._outer(x, self._bottleneck(self.project1(x), self._one_convolution))

    def plain(self, x: Tensor) -> Tensor:
        """The same with one convolution after the other, as in the figure."""
        return self._outer(x, self._bottleneck(self.project1(x), self._three_convolutions))

    def _outer(self, x: Tensor, b: Tensor) -> Tensor:
        return x + self.project2(self.dropout(F.gelu(b)))

    def _bottleneck(self, d: Tensor, depthwise) -> Tensor:
        raise NotImplementedError

    # ------------------------------------------------------------------ (B, H, W, n) -> the same
    def _one_convolution(self, d: Tensor) -> Tensor:
        """The sum or mean of the depthwise convolutions as one of them, with a kernel built from theirs."""
        kernel, bias = self.adapter_conv.folded_depthwise()
        convolved = F.conv2d(d.permute(0, 3, 1, 2), kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return convolved.permute(0, 2, 3, 1)

    def _three_convolutions(self, d: Tensor) -> Tensor:
        convolutions = self.adapter_conv.convolutions()
        total = sum(conv(d.permute(0, 3, 1, 2)) for conv in convolutions)
        return (total / len(convolutions) if self.reduce == "mean" else total).permute(0, 2, 3, 1)

    def _pointwise(self, a: Tensor) -> Tensor:
        projector = self.adapter_conv.projector
        return F.linear(a, projector.weight[:, :, 0, 0], projector.bias)


class MonaV1Layer(_EarlierMona):
    """The first design: no norm, the sum of the convolutions, one skip around them.

        d = project1(x)                                   C -> n
        a = DW3(d) + DW5(d) + DW7(d)
        b = PW(a) + d                                     1x1, skip from d
        y = x + project2(dropout(GELU(b)))                n -> C

    Parameters: (2n + 1) C + n^2 + 88 n with kernels 3, 5, 7. Source: a figure of the official repository (no code was
    published); the text on it was read off, so details are our reading. Biases, initialisation and the place of the
    dropout are those of the published layer.
    """

    reduce = "sum"

    def _bottleneck(self, d: Tensor, depthwise) -> Tensor:
        return self._pointwise(depthwise(d)) + d


class MonaV2Layer(_EarlierMona):
    """The second design: two scaled norms inside the bottleneck.

        d = project1(x)                                   C -> n
        s = LN1(d) * gamma1 + d * gammax1
        a = DW3(s) + DW5(s) + DW7(s) + d                  skip from d
        t = LN2(a) * gamma2 + a * gammax2
        b = PW(t) + a                                     1x1, skip from before LN2
        y = x + project2(dropout(GELU(b)))                n -> C

    Parameters: (2n + 1) C + n^2 + 96 n with kernels 3, 5, 7. Source: a figure of the official repository (no code was
    published); the text on it was read off. That each "LN + scale" has the two scales of the published layer (vectors,
    gamma from 1e-6, gammax from 1), and that the skips start before them, is our reading.
    """

    reduce = "sum"

    def __init__(self, dim: int, bottleneck: int = 64, *args, **kwargs):
        super().__init__(dim, bottleneck, *args, **kwargs)
        for i in (1, 2):
            self.add_module(f"norm{i}", nn.LayerNorm(bottleneck))
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.full((bottleneck,), 1e-6)))
            self.register_parameter(f"gammax{i}", nn.Parameter(torch.ones(bottleneck)))

    def _bottleneck(self, d: Tensor, depthwise) -> Tensor:
        a = depthwise(self.norm1(d) * self.gamma1 + d * self.gammax1) + d
        return self._pointwise(self.norm2(a) * self.gamma2 + a * self.gammax2) + a


class MonaV3Layer(MonaV2Layer):
    """The third design: `MonaV2Layer` with the mean of the convolutions in place of their sum.

        a = (DW3(s) + DW5(s) + DW7(s)) / 3 + d

    Parameters, source and doubts as there. The published layer came next: one scaled norm, before project1.
    """

    reduce = "mean"


EARLIER_DESIGNS = {"v1": MonaV1Layer, "v2": MonaV2Layer, "v3": MonaV3Layer}
