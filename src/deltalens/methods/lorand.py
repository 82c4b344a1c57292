"""LoRand (Yin et al., CVPR 2023): adapters whose projections are sums of low-rank products."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.methods.bottleneck import serial_slots


class LowRankSum(nn.Module):
    """y = x W + bias,  W = sum over the b branches of A_i g_i B_i,  x (..., in), y (..., out).

    A (b, in, k), g (b, k, k), B (b, k, out); each branch starts Kaiming-uniform with a = sqrt 5, bias U(-1, 1) / sqrt
    in. Parameters: b k (in + k + out) + out.

    The branches side by side are one matrix (in, b k) and, with g folded into B, one matrix (b k, out). x goes through
    these two where that costs less than x W, which is where b k (in + out) < in out; else W is built once per call.
    """

    def __init__(self, in_features: int, out_features: int, branches: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(branches, in_features, rank))
        self.g = nn.Parameter(torch.empty(branches, rank, rank))
        self.B = nn.Parameter(torch.empty(branches, rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-1, 1) / math.sqrt(in_features))
        for factors in (self.A, self.g, self.B):
            for factor in factors.detach():
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def narrow(self) -> bool:
        """Whether the low-rank product costs less than the full matrix."""
        branches, inputs, rank = self.A.shape
        outputs = self.B.shape[2]
        return branches * rank * (inputs + outputs) < inputs * outputs

    def forward(self, x: Tensor) -> Tensor:
        down = self.A.transpose(0, 1).flatten(1)
        up = (self.g @ self.B).flatten(0, 1)
        if self.narrow():
            return F.linear(F.linear(x, down.t()), up.t(), self.bias)
        return F.linear(x, (down @ up).t(), self.bias)

    def plain(self, x: Tensor) -> Tensor:
        """The published form: every branch's matrix, their sum, one product."""
        return x @ sum(a @ g @ b for a, g, b in zip(self.A, self.g, self.B, strict=True)) + self.bias


class LoRandLayer(nn.Module):
    """u + project2( GELU( project1(u) ) ),  project1 C -> C / reduction, project2 back, both `LowRankSum`."""

    pointwise = True

    def __init__(self, dim: int, branches: int, rank: int, reduction: int = 2, init: str = "official"):
        super().__init__()
        self.project1 = LowRankSum(dim, dim // reduction, branches, rank)
        self.project2 = LowRankSum(dim // reduction, dim, branches, rank)
        if init == "identity":
            nn.init.zeros_(self.project2.B)
            nn.init.zeros_(self.project2.bias)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.project2(F.gelu(self.project1(u)))


@register("lorand")
class LoRandConfig(Method):
    """Adapters with low-rank projections on the output of attention and MLP, before the residual add; head trained.

        u <- u + P2( GELU( P1(u) ) ),   P(u) = u (sum over b branches of A_i g_i B_i) + bias

    P1 maps C to C / reduction, P2 back. Blocks with one branch (ConvNeXt) get one adapter. The paper's sizes are
    presets: `lorand()` 2 branches of rank 8, `lorand_plus()` 4 x 8, `lorand_plus_plus()` 4 x 16. Parameters per adapter
    with reduction 2: 3 b k C + 2 b k^2 + 1.5 C; Swin-B: 1,203,456, 2,370,816, 4,754,688.

    The projections are computed as low-rank products where these cost less; `LowRankSum.plain` is the published form.
    init: "official" is not the identity at the start; "identity" zeroes the last factors and bias.
    """

    learning_rate: ClassVar = 3e-3

    branches: int = setting(default=2, help="number of low-rank products per projection, b")
    rank: int = setting(default=8, help="rank of each product, k")
    reduction: int = setting(default=2, help="the inner width is C / reduction")
    init: str = setting(
        default="official", help="official initialisation, or identity at the start", choices=("official", "identity")
    )

    @classmethod
    def lorand(cls) -> LoRandConfig:
        """LoRand: 2 branches of rank 8."""
        return cls(branches=2, rank=8)

    @classmethod
    def lorand_plus(cls) -> LoRandConfig:
        """LoRand+: 4 branches of rank 8, the released code."""
        return cls(branches=4, rank=8)

    @classmethod
    def lorand_plus_plus(cls) -> LoRandConfig:
        """LoRand++: 4 branches of rank 16."""
        return cls(branches=4, rank=16)

    def __post_init__(self):
        check_choices(self)
        for name in ("branches", "rank", "reduction"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def place(self, anatomy):
        for block in anatomy.blocks():
            if block.width < self.reduction:
                raise ValueError(f"reduction={self.reduction} leaves nothing of a stream of {block.width} channels")
            for slot in serial_slots(block, ("attention", "mlp"), "LoRand", anatomy):
                yield block, slot, LoRandLayer(block.width, self.branches, self.rank, self.reduction, self.init)
