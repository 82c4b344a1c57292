"""SCT, salient channel tuning (Zhao et al., IJCV 2023, arXiv 2309.08513)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, require
from deltalens.sites.layout import Layout


class SCTLayer(nn.Module):
    """x[..., S] <- x[..., S] + s * (W x[..., S] + b) for K salient channels S; all other channels pass.

    S is the buffer `channels`, in ascending order; -1 until it is chosen from data. W ~ truncated N(0, 0.02^2), b zero.
    """

    takes_layout = True

    def __init__(self, dim: int, num_channels: int, scale: float = 1.0):
        super().__init__()
        if num_channels > dim:
            raise ValueError(f"num_channels={num_channels} is more than the {dim} channels of the stream")
        self.scale = scale
        self.adapt = nn.Linear(num_channels, num_channels)
        nn.init.trunc_normal_(self.adapt.weight, std=0.02)
        nn.init.zeros_(self.adapt.bias)
        self.register_buffer("channels", torch.full((num_channels,), -1))
        self.ready = False
        self.labels: list[int] | None = None  # of the batch under way, while channels are being chosen
        self.energy: dict[int, Tensor] = {}

    @property
    def pointwise(self) -> bool:
        """The choice of channels reads all tokens."""
        return self.labels is None

    def train(self, mode: bool = True) -> SCTLayer:
        self.look()
        return super().train(mode)

    def look(self) -> bool:
        """Whether the channels are chosen; they may have come from a file in the meantime."""
        if not self.ready and not self.channels.is_meta:
            self.ready = bool((self.channels >= 0).all())
        return self.ready

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.labels is not None:
            self._observe(x, layout)
            return x
        if not self.ready and not self.look():
            raise RuntimeError(
                "SCT has not chosen its channels yet: call deltalens.prepare(model, loader) with the training data "
                "once before training (deltalens.training.fit does it by itself)"
            )
        features = layout.features(x)
        change = self.adapt(features[..., self.channels]) * self.scale
        return layout.stream(features.index_add(features.dim() - 1, self.channels, change.to(features.dtype)))

    # ------------------------------------------------------------------ the choice
    def _observe(self, x: Tensor, layout: Layout) -> None:
        """Add each image's sum of squares over its patch tokens to its class."""
        tokens = layout.split(x)[0].flatten(1, 2) if layout.has_map else x[:, layout.prefix :]
        squares = tokens.float().square().sum(1).cpu().double()
        for label, square in zip(self.labels, squares, strict=True):
            self.energy[label] = self.energy.get(label, 0) + square

    def choose(self) -> None:
        """Take the channels whose L2 norm over a class's tokens, averaged over the classes, is largest."""
        importance = torch.stack([energy.sqrt() for energy in self.energy.values()]).mean(0)
        self.channels.copy_(importance.topk(len(self.channels)).indices.sort().values)
        self.ready = True


@register("sct")
class SCTConfig(Method):
    """A linear layer on the K most salient channels of the stream, after attention in every block; head trained.

        x = x + attn(norm1 x);  x[S] = x[S] + s * (W x[S] + b);  x = x + mlp(norm2 x)

    S is chosen once per block from the task's training data on the frozen backbone: for each channel the L2 norm over
    all patch tokens of a class, averaged over the classes, the K largest. It is kept in the adapter's files.
    Parameters per block: K^2 + K; ViT-B/16 with K=96 111,744. Not an identity at the start, as published.

    `deltalens.training.fit` makes the choice by itself; in a loop of your own call `deltalens.prepare(model, loader)`
    first. The paper's variants on the MLP's output and on q and v are not offered. The official ViT code ignores its
    factor s; the Swin code uses it.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 3e-3

    num_channels: int = setting(default=96, help="salient channels K, at most the width of the narrowest block")
    scale: float = setting(default=1.0, help="factor s on the change")

    def __post_init__(self):
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")

    def place(self, anatomy: Anatomy):
        for block in anatomy.blocks():
            require(block, "attention.stream", "SCT", anatomy.model)
            yield block, "attention.stream", SCTLayer(block.width, self.num_channels, self.scale)

    def prepare(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Choose the channels of all active SCT layers that have none. loader: batches of images (B, ...), or of
        (images, labels (B,)); without labels all images count as one class."""
        layers = [module for module in model.modules() if isinstance(module, SCTLayer) and not module.look()]
        if not layers:
            return
        device = next(model.parameters()).device
        try:
            for batch in loader:
                images, labels = (batch[0], batch[1]) if isinstance(batch, (list, tuple)) else (batch, None)
                known = isinstance(labels, Tensor) and labels.dim() == 1
                for layer in layers:
                    layer.labels = labels.tolist() if known else [0] * len(images)
                with torch.no_grad():
                    model(images.to(device))
            for layer in [layer for layer in layers if layer.energy]:  # those of inactive adapters saw nothing
                layer.choose()
        finally:
            for layer in layers:
                layer.labels, layer.energy = None, {}
