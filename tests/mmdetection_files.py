"""The names and shapes of mmdetection's Cascade Mask R-CNN checkpoints, filled with numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def layer(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def batch_norm(name: str, width: int) -> Shapes:
    yield from layer(name, width)
    for statistic in ("running_mean", "running_var"):
        yield f"{name}.{statistic}", (width,)
    yield f"{name}.num_batches_tracked", ()


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> Shapes:
    yield "backbone.conv1.weight", (64, 3, 7, 7)
    yield from batch_norm("backbone.bn1", 64)
    before = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for block in range(depth):
            path = f"backbone.layer{stage + 1}.{block}"
            for number, (out, into, side) in enumerate(
                ((width, before, 1), (width, width, 3), (4 * width, width, 1)), 1
            ):
                yield f"{path}.conv{number}.weight", (out, into, side, side)
                yield from batch_norm(f"{path}.bn{number}", out)
            if block == 0:
                yield f"{path}.downsample.0.weight", (4 * width, before, 1, 1)
                yield from batch_norm(f"{path}.downsample.1", 4 * width)
            before = 4 * width


def swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, form: str) -> Shapes:
    """form: "layers" as in the fork of Swin's authors, "stages" as in mmdetection."""
    own = form == "stages"
    yield from layer(f"backbone.patch_embed.{'projection' if own else 'proj'}", width, 3, 4, 4)
    yield from layer("backbone.patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        wide = width * 2**stage
        for block in range(depth):
            path = f"backbone.{form}.{stage}.blocks.{block}"
            attention = f"{path}.attn.w_msa" if own else f"{path}.attn"
            yield from layer(f"{path}.norm1", wide)
            yield f"{attention}.relative_position_bias_table", ((2 * window - 1) ** 2, heads[stage])
            yield f"{attention}.relative_position_index", (window**2, window**2)
            yield from layer(f"{attention}.qkv", 3 * wide, wide)
            yield from layer(f"{attention}.proj", wide, wide)
            yield from layer(f"{path}.norm2", wide)
            yield from layer(f"{path}.{'ffn.layers.0.0' if own else 'mlp.fc1'}", 4 * wide, wide)
            yield from layer(f"{path}.{'ffn.layers.1' if own else 'mlp.fc2'}", wide, 4 * wide)
        if stage < 3:
            yield from layer(f"backbone.{form}.{stage}.downsample.norm", 4 * wide)
            yield f"backbone.{form}.{stage}.downsample.reduction.weight", (2 * wide, 4 * wide)
        yield from layer(f"backbone.norm{stage}", wide)


def cascade(
    widths: list[int], classes: int = 80, channels: int = 256, box: int = 1024, convs: bool = False, mask: bool = True
) -> Shapes:
    """Neck, proposals and three stages behind maps of these widths."""
    for level, width in enumerate(widths):
        yield from layer(f"neck.lateral_convs.{level}.conv", channels, width, 1, 1)
        yield from layer(f"neck.fpn_convs.{level}.conv", channels, channels, 3, 3)
    yield from layer("rpn_head.rpn_conv", channels, channels, 3, 3)
    yield from layer("rpn_head.rpn_cls", 3, channels, 1, 1)
    yield from layer("rpn_head.rpn_reg", 12, channels, 1, 1)
    for stage in range(3):
        path = f"roi_head.bbox_head.{stage}"
        yield from layer(f"{path}.fc_cls", classes + 1, box)
        yield from layer(f"{path}.fc_reg", 4, box)
        for number in range(4 if convs else 0):
            yield f"{path}.shared_convs.{number}.conv.weight", (channels, channels, 3, 3)
            yield from batch_norm(f"{path}.shared_convs.{number}.bn", channels)
        yield from layer(f"{path}.shared_fcs.0", box, channels * 49)
        if not convs:
            yield from layer(f"{path}.shared_fcs.1", box, box)
        if mask:
            path = f"roi_head.mask_head.{stage}"
            for number in range(4):
                yield from layer(f"{path}.convs.{number}.conv", channels, channels, 3, 3)
            yield f"{path}.upsample.weight", (channels, channels, 2, 2)
            yield f"{path}.upsample.bias", (channels,)
            yield from layer(f"{path}.conv_logits", classes, channels, 1, 1)


def filled(*shapes: Shapes, device: str = "cpu") -> dict[str, Tensor]:
    """A state dict with random numbers, variances positive."""
    random = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, shape in (pair for each in shapes for pair in each):
        if device == "meta":
            found[name] = torch.empty(shape, device=device)
        elif name.endswith(("relative_position_index", "num_batches_tracked")):
            found[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            value = torch.randn(shape, generator=random) * (0.5 if len(shape) > 1 else 0.1)
            found[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    return found
