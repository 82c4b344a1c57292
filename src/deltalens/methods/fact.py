"""FacT, factor-tuning (Jie & Deng, AAAI 2023, arXiv 2212.03145): one low-rank tensor for all weight changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.sites.anatomy import Anatomy, Site, having, require
from deltalens.sites.weights import part_shape

PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


class FacTCore(nn.Module):
    """G and P of FacT-TK, shared by all layers: slice j of the core is sum_k G[:, :, k] P[k, j], (r, r)."""

    def __init__(self, rank: int, slices: int):
        super().__init__()
        self.G = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))
        self.P = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, slices)))

    def forward(self, start: int, stop: int) -> Tensor:
        """Slices start:stop, (r, r, stop - start)."""
        return self.G @ self.P[:, start:stop]


class FacTLayer(nn.Module):
    """dy = s * V dropout( S U x ) for one linear part. U (r, C) and V (C, r) are shared by all layers of a width.

    A part that is o times wider at its output and i times at its input than C is cut into o i blocks (C, C), and S is
    (o r, i r): with x = [x_1 .. x_i],  dy = [s * V sum_b S_ab U x_b  for a in 1..o]. S is this layer's own (TT), or the
    slices first to first + o i of a shared core (TK).
    """

    pointwise = True

    def __init__(self, U: nn.Linear, V: nn.Linear, outputs: int, inputs: int, scale: float, dropout: float,
                 core: FacTCore | None = None, first: int = 0):  # fmt: skip
        super().__init__()
        self.U, self.V = U, V
        self.rank, self.outputs, self.inputs, self.scale, self.first = U.out_features, outputs, inputs, scale, first
        self.dropout = nn.Dropout(dropout)
        if core is None:
            self.S = nn.Linear(inputs * self.rank, outputs * self.rank, bias=False)
        else:
            self.core = core

    def _matrix(self) -> Tensor:
        """S, (o r, i r). The official code reshapes the slices (r, r, k) of a wide part to (r, k r) as they lie in
        memory, so that its blocks share entries of all slices; kept, because the published results come from it."""
        if not hasattr(self, "core"):
            return self.S.weight
        slices = self.core(self.first, self.first + self.outputs * self.inputs)
        if self.outputs == self.inputs == 1:
            return slices[..., 0].T
        wide = slices.reshape(self.rank, -1)
        return wide.T if self.inputs == 1 else wide

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.U(x.unflatten(-1, (self.inputs, -1))).flatten(-2)
        hidden = self.dropout(F.linear(hidden, self._matrix()))
        return self.V(hidden.unflatten(-1, (self.outputs, -1))).flatten(-2) * self.scale

    def weight_change(self) -> Tensor:
        """The change of the part's weight, (out, in)."""
        blocks = self._matrix().unflatten(1, (self.inputs, -1)).unflatten(0, (self.outputs, -1))
        change = torch.einsum("cr,arbs,sd->acbd", self.V.weight, blocks, self.U.weight)
        return change.flatten(2).flatten(0, 1) * self.scale


@register("fact")
class FacTConfig(Method):
    """dW = s * V S U for every C x C block of the weights, U and V shared by all layers; head trained.

    form="tt" (tensor train): each block has its own r x r matrix S. form="tk" (Tucker): the blocks' S are mixtures of r
    shared r x r matrices, S_j = sum_k G_k P_kj. fc1 and fc2 count as C-wide blocks: 12 blocks a layer in a ViT with MLP
    ratio 4. Where widths differ between stages (Swin, ConvNeXt), layers of one width share factors.

    Parameters for L layers: tt 2 C r + 12 L r^2, tk 2 C r + 12 L r + r^3; ViT-B/16 61,440 (tt, r=16) and 86,528 (tk,
    r=32). V starts at zero, so that training starts from the backbone; U and S start as nn.Linear does, G and P
    Xavier-uniform. Merging is exact up to rounding.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 5e-3

    r: int = setting(default=16, help="rank of all factors")
    form: str = setting(default="tt", help="tensor train or Tucker", choices=("tt", "tk"))
    scale: float = setting(default=1.0, help="factor s; the official code searches it per dataset in 0.01 to 100")
    dropout: float = setting(default=0.1, help="dropout before V")
    parts: tuple[str, ...] = setting(default=PARTS, help="linear parts of a block: q, k, v, proj, fc1, fc2")

    def __post_init__(self):
        check_choices(self)
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {self.parts}")

    def place(self, anatomy: Anatomy):
        alike: dict[tuple[int, int], list[tuple[Site, str, int, int]]] = defaultdict(list)  # by tower and width
        for block in having(anatomy.blocks(), [f"weights:{name}" for name in self.parts]):
            for name in self.parts:
                require(block, f"weights:{name}", "FacT (or name parts that the block has)", anatomy.model)
                alike[id(block.tower), block.width].append((block, name, *_multiples(block, name)))
        for (_, width), places in alike.items():
            layer = self._factory(width, sum(outputs * inputs for _, _, outputs, inputs in places))
            first = 0
            for block, name, outputs, inputs in places:
                yield block, f"weights:{name}", layer(outputs, inputs, first)
                first += outputs * inputs

    def _factory(self, width: int, slices: int) -> Callable[[int, int, int], FacTLayer]:
        """Makes layers with common factors."""
        U, V = nn.Linear(width, self.r, bias=False), nn.Linear(self.r, width, bias=False)
        nn.init.zeros_(V.weight)
        core = FacTCore(self.r, slices) if self.form == "tk" else None
        return lambda outputs, inputs, first: FacTLayer(
            U, V, outputs, inputs, self.scale, self.dropout, core, first if core else 0
        )


def _multiples(block: Site, name: str) -> tuple[int, int]:
    """How many times wider than the stream a part's output and input are; whole numbers, one of them 1."""
    sizes = part_shape(block.module, block.parts[name])
    if any(size % block.width for size in sizes) or min(sizes) != block.width:
        raise ValueError(
            f"FacT cuts layers into blocks of {block.width} x {block.width}, and {name} of {block.path} is "
            f"{sizes[0]} x {sizes[1]}; leave it out of parts"
        )
    return sizes[0] // block.width, sizes[1] // block.width
