"""DAPT (Zhou et al., CVPR 2024, arXiv 2403.01439): dynamic adapters and prompts made of them, for point clouds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, check_choices, register, setting
from deltalens.methods.points import (
    READINGS,
    ReadTokens,
    class_vectors,
    classifier_of,
    point_towers,
    require_class_token,
)
from deltalens.methods.smoa import ScaleAndShift
from deltalens.methods.ssf import SSFLayer
from deltalens.sites.anatomy import Anatomy, Family, Part, Site, Tower, require
from deltalens.sites.layout import Layout
from deltalens.sites.weights import output_channels


class DynamicAdapter(nn.Module):
    """A(n) = relu(s . m + b) * up( dropout( gelu( down m ))),  m = LN n;  n (B, N, C) the normed stream.

    Each token scales its own change. prompt: what makes a token P = gamma * mean over tokens gelu(A(n)) + beta, which
    joins the stream; None for no prompt. down and the scale start Kaiming-uniform (a = sqrt 5), up and all biases zero.
    The change is dropped together with the MLP that it is beside; the prompt is not.
    """

    takes_layout = True
    in_drop_path = True

    def __init__(self, width: int, bottleneck: int, dropout: float, dynamic: bool, prompt: ScaleAndShift | None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)
        if dynamic:
            self.scale = nn.Linear(width, 1)
            nn.init.kaiming_uniform_(self.scale.weight, a=math.sqrt(5))
            nn.init.zeros_(self.scale.bias)
        if prompt is not None:
            self.prompt = prompt
        self.adds_tokens, self.pointwise = prompt is not None, prompt is None

    def change(self, n: Tensor) -> Tensor:
        """A(n), (B, N, C)."""
        m = self.norm(n)
        change = self.up(self.dropout(F.gelu(self.down(m))))
        return change * F.relu(self.scale(m)) if "scale" in self._modules else change

    def forward(self, x: Tensor, normed: Tensor, layout: Layout) -> Tensor | tuple[Tensor, Tensor]:
        change = self.change(normed)
        return (change, self.prompt(change)) if self.adds_tokens else change


class PatchTokens(nn.Module):
    """`patches`: TFTS on what the mini-PointNet gives, (B, G, C); and whether positions are added once."""

    def __init__(self, tfts: SSFLayer | None, positions_once: bool):
        super().__init__()
        if tfts is not None:
            self.tfts = tfts
        self.positions_once = positions_once

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tfts(tokens) if "tfts" in self._modules else tokens


@register("dapt")
class DAPTConfig(Method):
    """A bottleneck beside every MLP, scaled by each token itself; a prompt made of it; every layer scaled and shifted.

        n    = T(LN_2 x)                        T(y) = gamma * y + beta, for each channel: TFTS
        A(n) = relu(s . m + b) * up(gelu(down m)),  m = LN n          (B, N, C) -> (B, N, C), in every block
        x   <- x + drop_path( MLP(n) + A(n) )
        P_l  = gamma_l * mean over tokens gelu(A(n)) + beta_l         one token in every block
        next block reads [class token, P_l, P_l-1, ..., P_0, patches]
        logits = head([class token, mean of the prompts, maximum of the patches])

    T stands after the patches' tokens, norm1, qkv, proj, norm2, fc1, fc2 in every block, and the last norm.
    gamma ~ N(1, .02), beta ~ N(0, .02). Positions are added once, before the first block. Trained are these, the class
    tokens with their positions, and the head, all of it.

    The paper's settings are presets: `hardest()` (the defaults), `bg()`, `only()`, `modelnet40()`. The heads read
    different tokens there; drop path (.3, .3, .1 and .1) is the backbone's setting `drop_path`. Trained with AdamW,
    5e-4, decay .05, 300 epochs of batches of 32.

    Parameters, C the width, n the bottleneck, L blocks: L (2 C + 2 C n + n + C + C + 1) adapters, L 2 C prompts,
    L 22 C + 4 C TFTS, 2 C class token, and the head. Point-MAE with 15 classes: 1,087,771.

    The official code trains with the mini-PointNet's BatchNorm in training mode: it takes each batch's own statistics
    and moves the running ones, which are no parameters. Here frozen BatchNorm keeps its statistics, and what is saved
    is what was trained. Its model has no `reduce_dim`, and so cannot read Point-BERT's file as published; here TFTS
    stands after it. On ReCon TFTS stands in both streams' layers too, which its paper's code does not have.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 5e-4

    bottleneck: int = setting(default=64, help="inner width n of an adapter")
    dropout: float = setting(default=0.2, help="dropout in front of the up-projection")
    dynamic: bool = setting(default=True, help="each token scales its change; False adds it as it is")
    prompts: bool = setting(default=True, help="a prompt made of each block's adapter")
    tfts: bool = setting(default=True, help="scale and shift of every layer's output")
    positions_once: bool = setting(default=True, help="positions are added before the first block alone")
    read_class: bool = setting(default=True, help="the head reads the class token")
    read_prompts: str | None = setting(default="mean", help="what the head reads of the prompts", choices=READINGS)
    read_patches: str | None = setting(default="max", help="what the head reads of the patches", choices=READINGS)

    @classmethod
    def hardest(cls) -> DAPTConfig:
        """ScanObjectNN PB_T50_RS: 1,087,771 parameters on Point-MAE."""
        return cls()

    @classmethod
    def bg(cls) -> DAPTConfig:
        """ScanObjectNN OBJ_BG: as many."""
        return cls(dropout=0.5)

    @classmethod
    def only(cls) -> DAPTConfig:
        """ScanObjectNN OBJ_ONLY: the head reads class token and prompts; 989,467 parameters."""
        return cls(dropout=0.0, read_patches=None)

    @classmethod
    def modelnet40(cls) -> DAPTConfig:
        """ModelNet40: bottleneck 72; the head reads class token and patches. The last block's prompt is read by nobody,
        and is counted."""
        return cls(bottleneck=72, dropout=0.0, read_prompts=None)

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.read_prompts is not None and not self.prompts:
            raise ValueError("read_prompts reads prompts, and prompts=False makes none: set read_prompts to None")
        if not self.read_class and self.read_prompts is None and self.read_patches is None:
            raise ValueError("the head must read something: read_class, read_prompts or read_patches")

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        for tower, owner in point_towers(anatomy, "DAPT"):
            require_class_token(tower, "DAPT", anatomy)
            classifier = classifier_of(tower, "DAPT", anatomy)
            tokens = SSFLayer(owner.width) if self.tfts else None
            yield owner, "patches", PatchTokens(tokens, self.positions_once)
            for block in tower.blocks:
                require(block, "mlp.parallel", "DAPT", anatomy.model)
                prompt = ScaleAndShift(block.width, "gelu") if self.prompts else None
                layer = DynamicAdapter(block.width, self.bottleneck, self.dropout, self.dynamic, prompt)
                yield block, "mlp.parallel", layer
            if self.tfts:
                yield from _tfts(tower, owner)
            yield classifier, "pool", ReadTokens(self.read_class, self.read_prompts, self.read_patches)

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        for tower, _ in point_towers(anatomy, "DAPT"):
            yield from tower.class_tensors

    def head(self, layer: nn.Module) -> nn.Module:
        vectors = class_vectors(layer) if self.read_class else 0
        return layer.with_vectors(vectors + sum(each is not None for each in (self.read_prompts, self.read_patches)))


def _tfts(tower: Tower, owner: Site) -> Iterator[Placement]:
    """Scale and shift after every layer of the blocks, and after the last norm."""
    for site in [*tower.blocks, Site(_path(owner, "norm"), owner.module.norm, _LAYER, owner.width)]:
        for name, layer in site.module.named_modules():
            shape = None if "delta" in name.split(".") else output_channels(layer)
            if shape is not None:
                path = ".".join(piece for piece in (site.path, name) if piece)
                yield Site(path, layer, _LAYER, shape[0]), "weights:all", SSFLayer(shape[0])


def _path(site: Site, name: str) -> str:
    return f"{site.path}.{name}" if site.path else name


_LAYER = Family(name="deltalens.methods.dapt:_LAYER", methods={}, parts=lambda layer: {"all": Part("")})
