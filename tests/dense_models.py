"""Small dense networks with random weights: one backbone of each kind under each head."""

from __future__ import annotations

import torch
from models import randomize
from torch import nn

import deltalens as dl
from deltalens.backbones.dense.body import Body, build

BACKBONES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 4, "drop_path_rate": 0.0},
    ),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "reg_tokens": 1}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}),
}
HEADS = {
    "upernet": {"channels": 8, "auxiliary_channels": 8},
    "fcn": {"channels": 8, "convs": 1},
    "dpt": {"channels": 8, "intermediate_channels": (8, 8, 8, 8)},
    "setr_pup": {"channels": 8},
}
SMALL_PYRAMID = {"vit": {"pyramid_channels": 8}}
CLASSES = 3


def body(kind: str, **options) -> Body:
    """A backbone with random weights, as heads get it."""
    name, sizes = BACKBONES[kind]
    found, _ = build(name, False, None, {**sizes, **options})
    randomize(found.module).eval()
    return found


def network(kind: str = "swin", head: str = "upernet", num_classes: int = CLASSES, **head_options) -> nn.Module:
    """A dense network with random weights, the same ones each time, in eval mode."""
    name, sizes = BACKBONES[kind]
    small = SMALL_PYRAMID.get(kind, {}) if head in ("upernet", "fcn") else {}
    options = {**HEADS[head], **small, **head_options}
    model = dl.create_backbone(
        name, pretrained=False, num_classes=num_classes, head=head, head_options=options, **sizes
    )
    return randomize(model).eval()


def pictures(height: int = 64, width: int = 64, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def loss_of(found: dict) -> torch.Tensor:
    """A number that depends on every logit of a network's output."""
    logits = [each for value in found.values() for each in (value if isinstance(value, list) else [value])]
    return sum(each.square().mean() for each in logits)
