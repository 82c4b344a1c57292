"""Seam: a `features_only` ViT sees two image sizes, with activation checkpointing, before one backward.

A checkpointed block runs again during backward, when the patch embedding has already recorded the other size.
"""

import pytest
import torch
from models import gradients, images, randomize_adapter, tiny_vit
from timm.models._features import FeatureGetterNet

import deltalens as dl
from deltalens.methods import LoRAConfig, MonaConfig, VPTConfig

SIZES = ((32, 32), (48, 24))
CONFIGS = {
    "mona": MonaConfig(bottleneck=4, dropout=0.0),
    "mona-low": MonaConfig(bottleneck=4, dropout=0.0, memory="low"),
    "vpt-deep": VPTConfig(num_tokens=3),
    "mona-on-vpt-shallow": [VPTConfig(num_tokens=3, deep=False), MonaConfig(bottleneck=4, dropout=0.0)],
    "lora": LoRAConfig(r=2),
}


def feature_network(checkpointing: bool) -> FeatureGetterNet:
    network = FeatureGetterNet(tiny_vit(dynamic_img_size=True, num_classes=0), out_indices=(0, 1, 2)).double()
    if checkpointing:
        network.model.set_grad_checkpointing()
    return network


def loss(network, size) -> torch.Tensor:
    maps = network(images("vit", size=size).double())
    assert [tuple(y.shape) for y in maps] == [(2, 24, size[0] // 8, size[1] // 8)] * 3
    return sum((y**2).sum() for y in maps)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_backward_equals_the_sum_of_two(name, checkpointing):
    network = feature_network(checkpointing)
    dl.attach(network, CONFIGS[name])
    randomize_adapter(network)
    network.train()

    expected = {}
    for size in SIZES:
        network.zero_grad()
        loss(network, size).backward()
        for key, gradient in gradients(network).items():
            expected[key] = expected.get(key, 0) + gradient

    network.zero_grad()
    sum(loss(network, size) for size in SIZES).backward()
    for key, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-10, rtol=1e-10)


def test_the_checkpoint_really_runs_blocks_again():
    network = feature_network(checkpointing=True)
    dl.attach(network, CONFIGS["mona"])
    runs = []
    network.model.blocks[1].norm1.register_forward_hook(lambda *args: runs.append(1))
    total = sum(loss(network, size) for size in SIZES)
    assert len(runs) == 2
    total.backward()
    assert len(runs) == 4
