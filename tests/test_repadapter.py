"""RepAdapter: the formula with grouped convolutions, folding into the layers behind it, and where it must not fold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, backward, images, randomize_adapter, tiny_convnext, tiny_swin, tiny_vit
from test_counts import SWIN, VIT_B, count
from timm.layers import SwiGLU
from timm.layers.attention import Attention

import deltalens as dl
from deltalens.methods.repadapter import RepAdapterLayer
from deltalens.sites.swap import Swapped


def adapted(build, config=None, **kwargs):
    config = config or dl.RepAdapterConfig(bottleneck=4, scale=0.7)
    return randomize_adapter(dl.attach(build(**kwargs).double(), config)).eval()


def layers_of(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, RepAdapterLayer)]


def is_plain(model, build, **kwargs) -> bool:
    plain = build(**kwargs)
    return (
        not any(isinstance(m, Swapped) for m in model.modules())
        and [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        and not layers_of(model)
    )


def formula(n: torch.Tensor, layer: RepAdapterLayer) -> torch.Tensor:
    """n + s * conv_B(conv_A(n)) with 1x1 convolutions over tokens (B, N, C), conv_B in groups."""
    hidden = F.conv1d(n.transpose(1, 2), layer.down.weight[..., None], layer.down.bias)
    up = F.conv1d(hidden, layer.up_weight[..., None], layer.up_bias, groups=layer.groups)
    return n + layer.scale * up.transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_layer(groups):
    layer = randomize_adapter(RepAdapterLayer(24, 8, groups, scale=0.7).double()).eval()
    n = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(n), formula(n, layer), atol=1e-12, rtol=1e-12)
    wanted = (n, *layer.parameters())
    found, expected = (torch.autograd.grad(y.sin().sum(), wanted) for y in (layer(n), formula(n, layer)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    matrix, shift = layer.affine()
    torch.testing.assert_close(n @ matrix.T + shift, layer(n), atol=1e-12, rtol=1e-12)


def test_the_model():
    """The layers stand between norm and attention, and between norm and MLP."""
    model, plain, x = adapted(tiny_vit), tiny_vit().double(), images("vit").double()
    plain.head.load_state_dict(model.head.state_dict())
    for block, own in zip(plain.blocks, model.blocks, strict=True):
        for norm, slot in ((block.norm1, "attention.pre"), (block.norm2, "mlp.pre")):
            (layer,) = own.delta.live(slot)
            norm.register_forward_hook(lambda norm, inputs, n, layer=layer: formula(n, layer))
    output, _ = backward(model, x)
    torch.testing.assert_close(output, plain(x), atol=1e-12, rtol=1e-12)


def test_start_is_the_backbone():
    model, x = tiny_vit(), images("vit")
    before = model(x)
    dl.attach(model, dl.RepAdapterConfig())
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)
    bound = (6 / (24 + 8)) ** 0.5
    weight = model.blocks[0].delta.live("mlp.pre")[0].down.weight
    assert 0.8 * bound < weight.abs().max() < bound


def test_counts_of_the_official_code():
    assert count(VIT_B, dl.RepAdapterConfig()).adapter == 24 * (768 * 8 + 8 + 768 * 4 + 768) == 239_808
    assert count(VIT_B, dl.RepAdapterConfig(branches=("attention",))).adapter == 119_904
    widths = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert count(SWIN["t"], dl.RepAdapterConfig()).adapter == sum(2 * (8 * c + 8 + 4 * c + c) for c in widths)


# ------------------------------------------------------------------ merging
@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_merged_equals_unmerged(family, qkv_bias):
    kwargs = {} if family == "convnext" else {"qkv_bias": qkv_bias}
    model, x = adapted(MODELS[family], **kwargs), images(family).double()
    expected = model(x)
    with dl.disable_adapter(model):
        assert (model(x) - expected).abs().max() > 1e-3
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert is_plain(merged, MODELS[family], **kwargs)


def test_merging_in_bf16_rounds_the_weights_only():
    model, x = adapted(tiny_vit), images("vit").double()
    expected = dl.merge_and_unload(copy.deepcopy(model)).bfloat16()
    merged = dl.merge_and_unload(model.bfloat16())
    exact, found = expected.blocks[0].attn.qkv.weight, merged.blocks[0].attn.qkv.weight
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.02)  # the layer's own weights were rounded too
    assert merged(x.bfloat16()).isfinite().all()


def test_merging_with_weight_methods_and_a_second_adapter():
    """LoRA, FacT and SSF on the readers are merged first: they read what the layers give."""
    model = dl.attach(tiny_vit().double(), [dl.RepAdapterConfig(bottleneck=4), dl.LoRAConfig(r=2), dl.SSFConfig()], "a")
    randomize_adapter(model)
    dl.attach(model, [dl.FacTConfig(r=2), dl.RepAdapterConfig(bottleneck=2, groups=1, scale=0.3)], "b")
    randomize_adapter(model, seed=2)
    dl.set_adapter(model, ["a", "b"])
    assert len(model.blocks[0].delta.live("attention.pre")) == 2
    x = images("vit").double()
    expected = model.eval()(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert is_plain(merged, tiny_vit)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_merging_beside_prompts(build, deep):
    """Prompts do not pass the layer but are projected by the same qkv: their keys and values become constants first."""
    model = adapted(build, [dl.RepAdapterConfig(bottleneck=4), dl.VPTConfig(num_tokens=3, deep=deep)])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert not layers_of(merged)


def test_prompts_that_stay_prompts_keep_the_layer():
    """Prompts that cannot become constants are still projected by qkv: that layer stays, the MLP's goes."""
    from deltalens.methods import Method, register
    from deltalens.methods.vpt import Prompts

    class ImagePrompts(Prompts):
        """Prompts that depend on the image."""

        constant = False

        def forward(self, x):
            return super().forward(x) + x.mean(1, keepdim=True)

    @register("test_pairs")
    class PairsConfig(Method):
        def place(self, anatomy):
            yield anatomy.blocks()[1], "attention.prompts", ImagePrompts(2, 24, 0.1)

    model = adapted(tiny_vit, [dl.RepAdapterConfig(bottleneck=4), PairsConfig()])
    x = images("vit").double()
    expected = model(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert layers_of(merged) == ["blocks.1.delta.attention_pre.adapter_default.repadapter"]


def test_swin_with_padded_windows_keeps_the_layer_before_attention():
    """Padding puts zeros among the windows' tokens after the layer: c would be added to them too."""
    kwargs = {"img_size": 40, "window_size": 4}  # maps of 10 and 5
    model = adapted(tiny_swin, **kwargs)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = model(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert len(layers_of(merged)) == 4
    assert all("attention_pre" in name for name in layers_of(merged))
    dynamic = dl.merge_and_unload(adapted(tiny_swin, strict_img_size=False))
    assert len(layers_of(dynamic)) == 4
    assert not layers_of(dl.merge_and_unload(adapted(tiny_swin)))


def test_other_readers():
    """Every layer that reads n takes the change (gated attention); MLPs that we do not know keep the layer."""

    class Gated(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, gated=True)

    x = images("vit").double()
    gated = adapted(tiny_vit, attn_layer=Gated)
    expected = gated(x)
    torch.testing.assert_close(dl.merge_and_unload(gated)(x), expected, atol=1e-10, rtol=1e-10)
    assert not layers_of(gated)
    model = adapted(tiny_vit, mlp_layer=SwiGLU)
    expected = model(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert not layers_of(merged)
    convolutional = adapted(tiny_convnext, conv_mlp=True)
    expected = convolutional(x := images("convnext").double())
    torch.testing.assert_close(dl.merge_and_unload(convolutional)(x), expected, atol=1e-10, rtol=1e-10)
    assert len(layers_of(convolutional)) == 5


def test_a_module_that_is_not_affine_ends_the_folding():
    """pre modules act in order; only those at the end can be folded."""
    from torch import nn

    from deltalens.methods import Method, register

    @register("test_tanh")
    class TanhConfig(Method):
        def place(self, anatomy):
            for block in anatomy.blocks():
                layer = nn.Sequential(nn.Linear(block.width, block.width), nn.Tanh())
                yield block, "mlp.pre", layer

    first, last = dl.RepAdapterConfig(bottleneck=2, branches=("mlp",)), dl.RepAdapterConfig(bottleneck=4)
    model = adapted(tiny_vit, [first, TanhConfig(), last])
    x = images("vit").double()
    expected = model(x)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert layers_of(merged) == [f"blocks.{i}.delta.mlp_pre.adapter_default.repadapter" for i in range(3)]


# ------------------------------------------------------------------ errors
def test_errors():
    for settings in ({"groups": 3}, {"bottleneck": 0}, {"groups": 0}):
        with pytest.raises(ValueError, match="groups must divide bottleneck"):
            dl.RepAdapterConfig(**settings)
    with pytest.raises(ValueError, match="branches must be some of attention, mlp"):
        dl.RepAdapterConfig(branches=("attn",))
    with pytest.raises(ValueError, match="dropout must be in"):
        dl.RepAdapterConfig(dropout=1.5)
    with pytest.raises(ValueError, match="groups=5 does not divide the 24 channels"):
        dl.attach(tiny_vit(), dl.RepAdapterConfig(bottleneck=5, groups=5))
    with pytest.raises(TypeError, match=r"RepAdapter needs the slot 'attention\.pre'"):
        dl.attach(tiny_convnext(), dl.RepAdapterConfig(branches=("attention",)))
    with pytest.raises(TypeError, match=r"RepAdapter needs the slot 'attention\.pre', which UnknownBlock"):
        dl.attach(MODELS["resnet"](), dl.RepAdapterConfig())
