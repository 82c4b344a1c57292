"""The bottleneck that Adapter and AdaptFormer place, on a branch or beside it, and where branches are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Site, require

ACTIVATIONS = {"gelu": F.gelu, "relu": torch.relu}


class Bottleneck(nn.Module):
    """change(x) = scale * up( dropout( activation( down(x) ) ) ),  x (..., C), down C -> n, up n -> C, with biases.

    init: "identity" (down trunc-normal .02, up zero), "official" (both trunc-normal .02, as in Mona's code), "lora"
    (down Kaiming-uniform with a = sqrt 5, up zero, as in AdaptFormer's code). Biases are zero. Parameters:
    (2 C + 1) n + C.
    """

    pointwise = True

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        activation: str = "gelu",
        scale: float = 1.0,
        dropout: float = 0.0,
        init: str = "identity",
    ):
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.dropout, self.scale, self.activation = nn.Dropout(dropout), scale, activation
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        else:
            nn.init.trunc_normal_(self.down.weight, std=0.02)
        if init == "official":
            nn.init.trunc_normal_(self.up.weight, std=0.02)
        else:
            nn.init.zeros_(self.up.weight)

    def change(self, x: Tensor) -> Tensor:
        update = self.up(self.dropout(ACTIVATIONS[self.activation](self.down(x))))
        return update if self.scale == 1 else self.scale * update


class SerialBottleneck(Bottleneck):
    """u + change(u): sits on a branch's output or on the stream."""

    def forward(self, u: Tensor) -> Tensor:
        return u + self.change(u)


class ParallelBottleneck(Bottleneck):
    """change(x), or change(norm(x)): the delta of a module beside a branch."""

    def __init__(self, *settings, reads: str = "stream"):
        super().__init__(*settings)
        self.reads = reads

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        return self.change(normed if self.reads == "norm" else x)


def serial_slots(block: Site, branches: tuple[str, ...], method: str, anatomy: Anatomy) -> list[str]:
    """Where modules on branch outputs go in this block: `<branch>.inner` of the branches it has; the block's output
    where it shows none and the method wants the MLP's only. TypeError otherwise."""
    slots = [f"{branch}.inner" for branch in branches if f"{branch}.inner" in block.slots]
    if not slots and branches == ("mlp",) and "block.stream" in block.slots:
        return ["block.stream"]
    if not slots:
        require(block, f"{branches[0]}.inner", method, anatomy.model)
    return slots
