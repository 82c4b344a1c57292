"""RepAdapter (Luo et al., arXiv 2302.08106): linear bottlenecks that disappear into the layers behind them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, require


class RepAdapterLayer(nn.Module):
    """n + s * (B (A n + a) + b):  A (h, C) dense, B (C, h) block-diagonal in g groups, dropout between them.

    Output channels i C/g to (i+1) C/g read the hidden channels i h/g to (i+1) h/g. A Xavier-uniform; a, B and b zero,
    so that the layer starts as the identity.
    """

    pointwise = True

    def __init__(self, dim: int, bottleneck: int = 8, groups: int = 2, scale: float = 1.0, dropout: float = 0.1):
        super().__init__()
        if dim % groups:
            raise ValueError(f"groups={groups} does not divide the {dim} channels of the stream")
        self.groups, self.scale = groups, scale
        self.down = nn.Linear(dim, bottleneck)
        self.up_weight = nn.Parameter(torch.zeros(dim, bottleneck // groups))
        self.up_bias = nn.Parameter(torch.zeros(dim))
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def _up(self) -> Tensor:
        """B as a matrix (C, h)."""
        return torch.block_diag(*self.up_weight.chunk(self.groups))

    def forward(self, n: Tensor) -> Tensor:
        return n + self.scale * F.linear(self.dropout(self.down(n)), self._up(), self.up_bias)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(M, c) of the layer written as M n + c."""
        up = self._up()
        identity = torch.eye(len(up), device=up.device, dtype=up.dtype)
        return identity + self.scale * up @ self.down.weight, self.scale * (up @ self.down.bias + self.up_bias)


@register("repadapter")
class RepAdapterConfig(Method):
    """n -> n + s * (B (A n + a) + b) on what attention and MLP read, without activation; head trained.

        x = x + attn(R_1(norm1 x));  x = x + mlp(R_2(norm2 x))

    The formula is `RepAdapterLayer`'s. Parameters per layer: C h + h + C h / g + C; ViT-B/16 239,808 (the paper's
    0.22 M leaves out the biases that its code has). Nothing stands between such a layer and the linear layer that
    follows it, so merging is exact and leaves a plain model; the docs page has the cases where layers stay. Where a
    block has no attention (ConvNeXt) the MLP's layer is the only one.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 3e-3

    bottleneck: int = setting(default=8, help="inner width h")
    groups: int = setting(default=2, help="groups g of the up-projection")
    scale: float = setting(default=1.0, help="factor s; the official code searches it per dataset in 0.1 to 10")
    dropout: float = setting(default=0.1, help="dropout in the bottleneck")
    branches: tuple[str, ...] = setting(
        default=("attention", "mlp"), help="branches that get a layer; the official `repattn` is attention only"
    )

    def __post_init__(self):
        if self.bottleneck < 1 or self.groups < 1 or self.bottleneck % self.groups:
            raise ValueError(
                f"groups must divide bottleneck, both at least 1, got {self.groups} groups and {self.bottleneck}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.branches or not set(self.branches) <= {"attention", "mlp"}:
            raise ValueError(f"branches must be some of attention, mlp, got {self.branches}")

    def place(self, anatomy: Anatomy):
        for block in anatomy.blocks():
            slots = [f"{branch}.pre" for branch in self.branches]
            for slot in [slot for slot in slots if slot in block.slots] or slots[:1]:
                require(block, slot, "RepAdapter", anatomy.model)
                layer = RepAdapterLayer(block.width_of(slot), self.bottleneck, self.groups, self.scale, self.dropout)
                yield block, slot, layer
