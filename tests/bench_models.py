"""Tiny timm models for benchmarks, and double precision within a test."""

import pytest
import timm
import torch
from torch import nn

from deltalens.studies.benchmarks import Options

ONCE = Options(quick=True, rounds=1)


def tiny_vit(**changes) -> nn.Module:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **settings | changes)


def tiny_pooling_vit() -> nn.Module:
    """Its head reads the map, where a class token would leave the last Mona layer without effect."""
    return tiny_vit(global_pool="avg")


def tiny_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
        drop_path_rate=0.0,
    )


@pytest.fixture
def float64():
    """Everything inside a test is created in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_function(ours, plain, parameters_of_ours, parameters_of_plain, images):
    gradients = []
    for model, parameters in ((ours, parameters_of_ours), (plain, parameters_of_plain)):
        model.train()
        output = model(images)
        model.zero_grad()
        output.square().sum().backward()
        assert all(p.grad is not None for p in parameters)
        gradients.append([output.detach(), *(p.grad for p in parameters)])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
        assert other.abs().max() > 0
