"""Parameter counts of the classic baselines on real architectures, against the published numbers."""

import pytest
from test_counts import SWIN, VIT_B, WIDTHS, count, on_meta

import deltalens as dl
from deltalens.methods import (
    AdapterConfig,
    AdaptFormerConfig,
    BitFitConfig,
    LoRandConfig,
    MLPConfig,
    NormTuningConfig,
    PartialConfig,
    SidetuneConfig,
    VPTConfig,
)

VIT_WHOLE = 85_798_656  # the backbone's parameters, as VPT's tables count them


def detector_norms(size: str, tensors: int) -> int:
    """The output norms of the first three stages, which a detector's Swin has and the classifier has not."""
    first, depths = WIDTHS[size]
    return tensors * sum(first * 2**stage for stage in range(len(depths) - 1))


@pytest.mark.parametrize(
    ("size", "bias", "norm", "partial"),
    [
        ("t", 76_218, 26_112, 7_091_928),
        ("b", 201_656, 59_392, 12_601_632),
        ("l", 302_484, 89_088, 28_339_632),
    ],
)
def test_unfrozen_parts_of_monas_comparison(size, bias, norm, partial):
    assert count(SWIN[size], NormTuningConfig()).adapter == norm - detector_norms(size, 2)
    assert count(SWIN[size], BitFitConfig()).adapter == bias - detector_norms(size, 1)
    assert count(SWIN[size], PartialConfig(final_norm=False)).adapter == partial
    with_norm = count(SWIN[size], PartialConfig()).adapter
    assert with_norm - partial == 2 * 8 * WIDTHS[size][0]


@pytest.mark.parametrize(
    ("size", "adapter", "adaptformer"),
    [
        ("t", 1_140_864, 570_432),
        ("b", 3_107_328, 1_553_664),
        ("l", 4_659_456, 2_329_728),
    ],
)
def test_bottlenecks_of_monas_comparison(size, adapter, adaptformer):
    assert count(SWIN[size], AdapterConfig.mona_baseline()).adapter == adapter
    assert count(SWIN[size], AdaptFormerConfig.mona_baseline()).adapter == adaptformer
    assert count(SWIN[size], AdaptFormerConfig(form="serial")).adapter == adaptformer


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LoRandConfig.lorand(), 1_203_456),
        (LoRandConfig.lorand_plus(), 2_370_816),
        (LoRandConfig.lorand_plus_plus(), 4_754_688),
    ],
)
def test_lorand_on_swin_b(config, published):
    b, k = config.branches, config.rank
    first, depths = WIDTHS["b"]
    widths = [first * 2**stage for stage, depth in enumerate(depths) for _ in range(2 * depth)]
    formula = sum(b * k * (3 * c + 2 * k) + c + c // 2 for c in widths)
    assert count(SWIN["b"], config).adapter == formula == published


@pytest.mark.parametrize(("reduction", "published"), [(8, 1_779_840), (64, 230_544), (256, 64_548)])
def test_vpts_adapter(reduction, published):
    assert count(VIT_B, AdapterConfig.vpt_baseline(reduction)).adapter == published


def test_adapter_widths():
    assert count(VIT_B, AdapterConfig()).adapter == 24 * (129 * 768 + 64)
    assert count(VIT_B, AdapterConfig.houlsby(16)).adapter == 24 * (33 * 768 + 16)
    assert count(VIT_B, AdapterConfig.pfeiffer(16)).adapter == 12 * (33 * 768 + 16)
    assert count(VIT_B, AdapterConfig(bottleneck=16, parallel=True)).adapter == 24 * (33 * 768 + 16)
    assert count("convnext_tiny", AdapterConfig(bottleneck=4)).adapter == sum(
        depth * (9 * width + 4) for depth, width in zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)
    )
    with pytest.raises(ValueError, match="reduction=256 leaves nothing of a stream of 96 channels"):
        dl.attach(on_meta(SWIN["t"]), AdapterConfig(reduction=256))


def test_heads_and_side_networks():
    mlp = count(VIT_B, MLPConfig(layers=3), num_classes=100)
    assert (mlp.adapter, mlp.head) == (0, 2 * (768 * 768 + 3 * 768) + 769 * 100)
    assert mlp.head == 1_261_156
    side = count(VIT_B, SidetuneConfig(pretrained=False), num_classes=100)
    assert side.adapter == 2_469_696 + 9_216 * 768 + 1 == 9_547_585
    partial = count(VIT_B, PartialConfig(), num_classes=100)
    assert partial.adapter == 7_087_872 + 2 * 768
    assert partial.head == 76_900


def test_total_parameters_of_vpts_table():
    """24 tasks on one backbone, each with its own trained parameters, over one backbone: the column "Total params"."""
    fgvc, vtab = [200, 555, 102, 120, 196], [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    for config, published in (
        (MLPConfig(layers=3), 1.350),
        (SidetuneConfig(pretrained=False), 3.690),
        (BitFitConfig(), 1.048),
        (PartialConfig(), 3.002),
    ):
        found = count(VIT_B, config, num_classes=2)
        trained = sum(found.adapter + found.head + 769 * (classes - 2) for classes in fgvc + vtab)
        assert (VIT_WHOLE + trained) / VIT_WHOLE == pytest.approx(published, abs=6e-4)


def test_combined():
    both = count(VIT_B, [VPTConfig(num_tokens=10), AdapterConfig.pfeiffer(8), MLPConfig(layers=2)], num_classes=10)
    assert both.adapter == 92_160 + 12 * (17 * 768 + 8)
    assert both.head == 768 * 768 + 3 * 768 + 7_690
