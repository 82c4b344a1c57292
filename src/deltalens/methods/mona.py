"""Mona (Yin et al., CVPR 2025, arXiv 2408.08345): depthwise-convolution adapters on the residual stream."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.methods.mona_designs import EARLIER_DESIGNS, MonaV1Layer, MonaV2Layer
from deltalens.methods.mona_layer import MonaLayer
from deltalens.sites.anatomy import require

__all__ = ["MonaConfig", "MonaLayer"]


@register("mona")
class MonaConfig(Method):
    """Two Mona layers per block, on the residual stream after attention and after the MLP; head trained.

        x = Mona_1(x + attn(norm1 x));  x = Mona_2(x + mlp(norm2 x))

    The formula is `MonaLayer`'s. Convolutional blocks and blocks of unknown networks get one layer at their output.
    Prefix tokens (class token, registers, prompts) bypass it. Parameters per layer: (2n + 5) C + n^2 + 88 n.
    Differences of the official code from the paper: scales are vectors, convolutions have biases, both kept here; the
    frozen backbone keeps drop-path active in training, kept here (`frozen_mode = "train"`). Not an identity at the
    start, as published; init="identity" makes it one. `design` takes an earlier design of the paper's ablation
    (`MonaV1Layer`, `MonaV2Layer`, `MonaV3Layer`). Streams without a map (text) are a TypeError.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 3e-3

    bottleneck: int = setting(default=64, help="inner width n")
    kernels: tuple[int, ...] = setting(default=(3, 5, 7), help="sizes of the depthwise kernels, odd")
    reduce: str = setting(default="mean", help="how the depthwise outputs are combined", choices=("mean", "sum"))
    norm: str | None = setting(
        default="layer", help="scaled LayerNorm, BatchNorm in its place, or none", choices=("layer", "batch", None)
    )
    norm_position: str = setting(
        default="input", help="normalise before or after the down-projection", choices=("input", "bottleneck")
    )
    dropout: float = setting(default=0.1, help="dropout before the up-projection")
    init: str = setting(
        default="official", help="official initialisation, or identity at the start", choices=("official", "identity")
    )
    memory: str = setting(default="normal", help="low recomputes the bottleneck in backward", choices=("normal", "low"))
    design: str = setting(
        default="final",
        help="the published layer, or one of the earlier designs of its ablation",
        choices=("final", "v1", "v2", "v3"),
    )

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not self.kernels or any(size % 2 == 0 or size < 1 for size in self.kernels):
            raise ValueError(f"kernels must be odd sizes, at least one, got {self.kernels}")
        fixed = ("reduce", "norm", "norm_position", "memory") if self.design != "final" else ()
        for field in dataclasses.fields(self):
            if field.name in fixed and getattr(self, field.name) != field.default:
                raise ValueError(f"design={self.design!r} fixes {field.name}; leave it at {field.default!r}")

    def layer(self, dim: int) -> MonaLayer | MonaV1Layer | MonaV2Layer:
        """A Mona layer with these settings for a stream of `dim` channels."""
        if self.design != "final":
            return EARLIER_DESIGNS[self.design](dim, self.bottleneck, tuple(self.kernels), self.dropout, self.init)
        return MonaLayer(
            dim,
            self.bottleneck,
            tuple(self.kernels),
            self.reduce,
            self.norm,
            self.norm_position,
            self.dropout,
            self.init,
            self.memory,
        )

    def place(self, anatomy):
        for block in anatomy.blocks():
            if not block.tower.layout.has_map:
                raise TypeError(
                    f"Mona works on maps, and the stream of {block.path} ({type(block.module).__name__}) is a plain "
                    "sequence; adapt the vision tower only, or use LoRA, Adapter or VPT here"
                    + block.tower.layout.why_no_map()
                )
            two = {"attention.stream", "mlp.stream"} <= block.slots
            for slot in ("attention.stream", "mlp.stream") if two else ("block.stream",):
                require(block, slot, "Mona", anatomy.model)
                yield block, slot, self.layer(block.width)
