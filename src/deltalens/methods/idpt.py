"""IDPT (Zha et al., ICCV 2023, arXiv 2304.07221): one prompt made of each cloud's own patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.points import ReadTokens, class_vectors, classifier_of, point_towers, require_class_token
from deltalens.methods.vpt_prompts import hold
from deltalens.models.point_ops import take_points
from deltalens.sites.anatomy import Anatomy, Site, Tower, require
from deltalens.sites.layout import Layout

SLOPE = 0.2  # of the leaky ReLU


class EdgeConv(nn.Module):
    """h_i = max over j in near(i) of leaky( BN( W [x_j - x_i, x_i] ) ): x (B, G, C) -> (B, G, C).

    near(i): the k rows nearest to x_i in their own C channels, x_i itself among them. W (C, 2 C) = [V, U] is not
    multiplied with all G k pairs but with the G rows: W [x_j - x_i, x_i] = V x_j + (U - V) x_i.
    """

    def __init__(self, width: int, neighbours: int):
        super().__init__()
        self.weight = nn.Linear(2 * width, width, bias=False).weight
        self.norm = nn.BatchNorm1d(width)
        self.neighbours = neighbours

    def forward(self, x: Tensor) -> Tensor:
        difference, own = self.weight.chunk(2, 1)
        to_all, alone = F.linear(x, torch.cat([difference, own - difference])).chunk(2, -1)
        pairs = take_points(to_all, nearest_rows(x, self.neighbours)) + alone.unsqueeze(2)
        normed = self.norm(pairs.flatten(0, 2)).view(pairs.shape)
        return F.leaky_relu(normed, SLOPE).amax(2)


@torch.no_grad()
def nearest_rows(x: Tensor, count: int) -> Tensor:
    """Indices (B, G, count) of the rows nearest to each row of x (B, G, C), itself among them."""
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        squares = x.square().sum(-1)
        distance = squares.unsqueeze(2) - 2 * x @ x.transpose(1, 2) + squares.unsqueeze(1)
    return distance.topk(count, dim=2, largest=False).indices


class DynamicPrompt(nn.Module):
    """`tokens.out`: P + position joins the stream behind its prefix, (B, N, C) -> (B, N + 1, C).

        P = max over patches leaky( BN( W [h^1, ..., h^n] ) ),  h^1 = EdgeConv(patches), h^2 = EdgeConv(h^1)...

    layers: n; with 0 the patches themselves are read. The position (1, 1, C) is drawn from a normal distribution (std
    .02) and, as published, stays there.
    """

    def __init__(self, width: int, layers: int, neighbours: int, train_position: bool):
        super().__init__()
        self.edges = nn.ModuleList(EdgeConv(width, neighbours) for _ in range(layers))
        self.mix = nn.Linear(max(1, layers) * width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        hold(self, "position", nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02), train_position)

    def prompt(self, patches: Tensor) -> Tensor:
        """(B, G, C) -> (B, 1, C)."""
        found = []
        for edge in self.edges:
            found.append(edge(found[-1] if found else patches))
        mixed = self.mix(torch.cat(found, -1) if found else patches)
        normed = self.norm(mixed.flatten(0, 1)).view(mixed.shape)
        return F.leaky_relu(normed, SLOPE).amax(1, keepdim=True)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        patches = x[:, layout.prefix + layout.added(x) :]
        return layout.insert(x, self.prompt(patches) + self.position)


@register("idpt")
class IDPTConfig(Method):
    """A DGCNN reads the patches before the last block and makes one token of them; the head reads it.

        h^1 = EdgeConv(patches), h^2 = EdgeConv(h^1), h^3 = EdgeConv(h^2)          (B, G, C), k nearest in C channels
        P   = max over patches leaky( BN( W [h^1, h^2, h^3] ))                     (B, 1, C)
        last block reads [class token, P + position, patches]
        logits = head([class token, P, maximum of the patches])

    EdgeConv(x)_i = max over its k neighbours j of leaky( BN( W [x_j - x_i, x_i] )), leaky with slope .2. Trained are
    the DGCNN, the class tokens with their positions, and the head; the prompt's position is drawn and stays. Trained
    with AdamW, 5e-4, decay .05, 300 epochs of batches of 32.

    layers=1 and 2 are the official code's light forms, 0 its form without neighbours; its prompt from a transformer
    layer is not offered. Before another block than the last one the official code adds the prompt's position again in
    each block that follows; here it is added once.

    Parameters, C the width: 9 C^2 + 8 C for three layers, 2 C class token, and the head. Point-MAE with 15 classes:
    1,696,783, published as 1.7M. A cloud must have at least k patches.

    The official code trains with the mini-PointNet's BatchNorm in training mode, which moves its statistics; here they
    are frozen like everything else of the backbone.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 5e-4

    neighbours: int = setting(default=20, help="neighbours k of a patch, at most as many as there are patches")
    layers: int = setting(default=3, help="EdgeConv layers; 0 reads each patch alone")
    block: int | None = setting(default=None, help="index of the block that reads the prompt first; None for the last")
    train_position: bool = setting(default=False, help="train the prompt's position")
    read_class: bool = setting(default=True, help="the head reads the class token")
    read_prompt: bool = setting(default=True, help="the head reads the prompt")
    read_patches: bool = setting(default=True, help="the head reads the maximum of the patches")

    def __post_init__(self):
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.layers < 0:
            raise ValueError(f"layers must not be negative, got {self.layers}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}: the prompt is made of the block before it")
        if not (self.read_class or self.read_prompt or self.read_patches):
            raise ValueError("the head must read something: read_class, read_prompt or read_patches")

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        for tower, owner in point_towers(anatomy, "IDPT"):
            require_class_token(tower, "IDPT", anatomy)
            classifier = classifier_of(tower, "IDPT", anatomy)
            before = tower.blocks[self._reader(tower, owner) - 1]
            require(before, "tokens.out", "IDPT", anatomy.model)
            yield before, "tokens.out", DynamicPrompt(before.width, self.layers, self.neighbours, self.train_position)
            prompts, patches = "mean" if self.read_prompt else None, "max" if self.read_patches else None
            yield classifier, "pool", ReadTokens(self.read_class, prompts, patches)

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        for tower, _ in point_towers(anatomy, "IDPT"):
            yield from tower.class_tensors

    def head(self, layer: nn.Module) -> nn.Module:
        return layer.with_vectors(class_vectors(layer) * self.read_class + self.read_prompt + self.read_patches)

    def _reader(self, tower: Tower, owner: Site) -> int:
        """The index of the block that reads the prompt first. ValueError where it cannot be."""
        last = len(tower.blocks) - 1
        reader = last if self.block is None else self.block
        if not 0 < reader <= last:
            raise ValueError(f"IDPT's block must be from 1 to {last} on this model of {last + 1} blocks, got {reader}")
        if self.layers and self.neighbours > owner.module.num_groups:
            raise ValueError(
                f"neighbours={self.neighbours} is more than the {owner.module.num_groups} patches of a cloud here: "
                "choose fewer, or build the model with a larger num_groups"
            )
        return reader
