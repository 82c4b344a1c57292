"""Numbers of trainable parameters on real architectures, built without memory on the meta device."""

import functools

import pytest
import timm
import torch

import deltalens as dl
from deltalens.methods import BitFitConfig, FullConfig, LinearConfig, LoRAConfig, MonaConfig, VPTConfig

SWIN = {
    "t": "swin_tiny_patch4_window7_224",
    "b": "swin_base_patch4_window7_224",
    "l": "swin_large_patch4_window7_224",
}
VIT_B = "vit_base_patch16_224"
WIDTHS = {"t": (96, (2, 2, 6, 2)), "b": (128, (2, 2, 18, 2)), "l": (192, (2, 2, 18, 2))}


@functools.cache
def on_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def count(name: str, config, **kwargs):
    model = on_meta(name, **kwargs)
    dl.attach(model, config)
    found = dl.count_parameters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == found.trainable
    assert {p.device.type for p in model.parameters()} == {"meta"}
    dl.detach(model)
    return found


def mona_formula(size: str, n: int) -> int:
    first, depths = WIDTHS[size]
    return sum(2 * depth * ((2 * n + 5) * first * 2**stage + n**2 + 88 * n) for stage, depth in enumerate(depths))


@pytest.mark.parametrize(
    ("size", "bottleneck", "published"),
    [
        ("t", 64, 1_408_128),
        ("b", 64, 3_667_456),
        ("l", 64, 5_267_712),
        ("l", 32, 2_674_944),
        ("l", 128, 10_748_160),
    ],
)
def test_mona(size, bottleneck, published):
    found = count(SWIN[size], MonaConfig(bottleneck=bottleneck))
    assert found.adapter == mona_formula(size, bottleneck) == published


@pytest.mark.parametrize(
    ("settings", "per_layer"),
    [
        ({}, lambda c, n: (2 * n + 5) * c + n**2 + 88 * n),
        ({"reduce": "sum"}, lambda c, n: (2 * n + 5) * c + n**2 + 88 * n),
        ({"kernels": (3,)}, lambda c, n: (2 * n + 5) * c + n**2 + (9 + 1 + 2) * n),
        ({"norm": "batch"}, lambda c, n: (2 * n + 5) * c + n**2 + 88 * n),
        ({"norm": None}, lambda c, n: (2 * n + 1) * c + n**2 + 88 * n),
        ({"norm_position": "bottleneck"}, lambda c, n: (2 * n + 1) * c + n**2 + 92 * n),
    ],
)
def test_mona_ablations_on_vit(settings, per_layer):
    assert count(VIT_B, MonaConfig(bottleneck=16, **settings)).adapter == 24 * per_layer(768, 16)


def test_mona_one_layer_per_convolutional_block():
    expected = sum(
        depth * (133 * width + 9_728) for depth, width in zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)
    )
    assert count("convnext_tiny", MonaConfig()).adapter == expected


@pytest.mark.parametrize(("size", "published"), [("t", 1_130_496), ("b", 3_080_192), ("l", 4_620_288)])
def test_lora_of_monas_comparison(size, published):
    assert count(SWIN[size], LoRAConfig.mona_baseline()).adapter == published


def test_lora_on_every_part():
    parts = {"q": 768 + 768, "k": 768 + 768, "v": 768 + 768, "proj": 768 + 768, "fc1": 768 + 3072, "fc2": 3072 + 768}
    for names in (("q",), ("q", "v"), tuple(parts)):
        assert count(VIT_B, LoRAConfig(r=4, parts=names)).adapter == 12 * 4 * sum(parts[name] for name in names)
    whole = LoRAConfig(r=4, target_modules=("attn.qkv",))
    assert count(VIT_B, whole).adapter == 12 * 4 * (768 + 3 * 768)


@pytest.mark.parametrize(("deep", "published"), [(False, 38_400), (True, 460_800)])
def test_vpt_on_vit(deep, published):
    found = count(VIT_B, VPTConfig(num_tokens=50, deep=deep), num_classes=100)
    assert found.adapter == published
    assert found.head == 769 * 100


@pytest.mark.parametrize("tokens", [1, 50])
def test_vpt_on_swin(tokens):
    assert count(SWIN["b"], VPTConfig(num_tokens=tokens)).adapter == 12_032 * tokens
    assert count(SWIN["b"], VPTConfig(num_tokens=tokens, deep=False)).adapter == 128 * tokens


@pytest.mark.parametrize(
    ("name", "whole"), [(SWIN["t"], 27_519_354), (SWIN["b"], 86_743_224), (SWIN["l"], 194_995_476)]
)
def test_full_is_the_whole_backbone(name, whole):
    found = count(name, FullConfig(), num_classes=10)
    assert found.adapter == found.backbone == whole
    assert found.percent == 100
    assert count(name, LinearConfig(), num_classes=10).adapter == 0


def test_bitfit():
    """Biases of ViT-B: patch embedding, 12 x (2 norms, qkv, proj, fc1, fc2), final norm."""
    assert count(VIT_B, BitFitConfig()).adapter == 768 + 12 * (2 * 768 + 3 * 768 + 768 + 3072 + 768) + 768 == 102_912
    with_tables = count(SWIN["t"], BitFitConfig()).adapter
    without = count(SWIN["t"], BitFitConfig(relative_position=False)).adapter
    tables = 169 * sum(depth * heads for depth, heads in zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True))
    assert with_tables - without == tables
    # the published 76,218 counts the four output norms of a detector, of which the classifier has the last one
    assert with_tables == 76_218 - (96 + 192 + 384)


def test_shares_and_classes():
    found = count(VIT_B, VPTConfig(num_tokens=10), num_classes=100)
    assert found.backbone == 85_798_656
    assert found.percent == pytest.approx(100 * 92_160 / 85_798_656)
    assert found.percent_with_head == pytest.approx(100 * (92_160 + 76_900) / 85_798_656)
    assert found.trainable == found.adapter + found.head
    model = dl.attach(on_meta(VIT_B, num_classes=100), MonaConfig(bottleneck=8), num_classes=7)
    assert dl.count_parameters(model).head == 769 * 7
    dl.detach(model)


def test_printed_line(capsys):
    model = on_meta(VIT_B, num_classes=100)
    dl.attach(model, VPTConfig(num_tokens=10))
    dl.print_trainable_parameters(model)
    assert capsys.readouterr().out == (
        "trainable params: 92,160 (0.107 % of the backbone's 85,798,656) | with head: 169,060 (0.197 %)\n"
    )
    rows = dl.parameter_table(model)
    assert [row.kind for row in rows].count("inserted") == 12
    assert {row.name for row in rows if row.kind == "head"} == {"head.weight", "head.bias"}
    assert rows[0].shape == (10, 768)
    dl.detach(model)


def test_a_plain_model_is_listed_too():
    rows = dl.parameter_table(on_meta(VIT_B, num_classes=10))
    assert sum(row.numel for row in rows) == 85_798_656 + 7_690
