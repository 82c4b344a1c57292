"""Convpass: the formula with convolutions throughout, prefix tokens as images of one pixel, placement, counts."""

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, assert_same, backward, images, randomize_adapter, tiny_convnext, tiny_swin, tiny_vit
from test_counts import SWIN, VIT_B, count

import deltalens as dl
from deltalens.methods.convpass import ConvpassLayer
from deltalens.sites.layout import ChannelsFirst, ChannelsLast, Sequence, Tokens

CONFIG = dl.ConvpassConfig(bottleneck=3, scale=0.7, dropout=0.0)


def bypass(image: torch.Tensor, layer: ConvpassLayer) -> torch.Tensor:
    """s * conv1x1( a( conv3x3( a( conv1x1(image) ) ) ) ) of an image (B, C, H, W)."""
    act = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
    x = act(F.conv2d(image, layer.down.weight[..., None, None], layer.down.bias))
    x = act(F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1))
    return layer.scale * F.conv2d(x, layer.up.weight[..., None, None], layer.up.bias)


def of_tokens(n: torch.Tensor, layer: ConvpassLayer, grid: tuple[int, int]) -> torch.Tensor:
    """Patch tokens as one image, every other token as an image of one pixel."""
    start = n.shape[1] - grid[0] * grid[1]
    pixels = [bypass(token[:, :, None, None], layer).flatten(2) for token in n[:, :start].unbind(1)]
    image = bypass(n[:, start:].transpose(1, 2).unflatten(2, grid), layer).flatten(2)
    return torch.cat([*pixels, image], 2).transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_layer_on_tokens(prefix):
    layer = randomize_adapter(ConvpassLayer(24, 3, scale=0.7, dropout=0.0).double())
    n = torch.randn(2, prefix + 15, 24, dtype=torch.float64, requires_grad=True)
    wanted = (n, *layer.parameters())
    ours, plain = layer(n, n, Tokens(prefix, (3, 5))), of_tokens(n, layer, (3, 5))
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    found, expected = (torch.autograd.grad(y.sin().sum(), wanted) for y in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_the_layer_on_maps():
    layer = randomize_adapter(ConvpassLayer(24, 3, dropout=0.0).double())
    image = torch.randn(2, 24, 3, 5, dtype=torch.float64)
    expected = bypass(image, layer)
    torch.testing.assert_close(layer(image, image, ChannelsFirst()), expected, atol=1e-12, rtol=1e-12)
    last = image.permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(last, last, ChannelsLast()).permute(0, 3, 1, 2), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_the_model(kwargs):
    """x + attn(norm1 x) + P_1(norm1 x), then the same with the MLP."""
    model, plain = dl.attach(tiny_vit(**kwargs).double(), CONFIG), tiny_vit(**kwargs).double()
    randomize_adapter(model)
    plain.head.load_state_dict(model.head.state_dict())
    x = images("vit").double()
    output, _ = backward(model, x)
    y = plain._pos_embed(plain.patch_embed(x))
    for block, own in zip(plain.blocks, model.blocks, strict=True):
        (first,), (second,) = own.delta.live("attention.parallel"), own.delta.live("mlp.parallel")
        n = block.norm1(y)
        y = y + block.attn(n) + of_tokens(n, first, (4, 4))
        n = block.norm2(y)
        y = y + block.mlp(n) + of_tokens(n, second, (4, 4))
    torch.testing.assert_close(output, plain.forward_head(plain.norm(y)), atol=1e-12, rtol=1e-12)


def test_start():
    model, x = tiny_vit(), images("vit")
    before = model(x)
    dl.attach(model, dl.ConvpassConfig(bottleneck=4))
    assert torch.equal(model(x), before)  # `up` is zero
    layer = model.blocks[0].delta.live("mlp.parallel")[0]
    identity = torch.zeros(4, 4, 3, 3)
    identity[range(4), range(4), 1, 1] = 1
    assert torch.equal(layer.conv.weight, identity)
    spread = ConvpassLayer(24, 4, conv_init="xavier").conv.weight
    bound = (6 / (2 * 4 * 9)) ** 0.5
    assert 0.7 * bound < spread.abs().max() < bound


def test_counts_of_the_official_code():
    assert count(VIT_B, dl.ConvpassConfig()).adapter == 24 * (2 * 768 * 8 + 768 + 9 * 64 + 16) == 327_552
    assert count(VIT_B, dl.ConvpassConfig(branches=("attention",))).adapter == 327_552 // 2
    widths = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert count(SWIN["t"], dl.ConvpassConfig()).adapter == sum(2 * (17 * c + 592) for c in widths)


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_other_image_sizes(size):
    model = randomize_adapter(dl.attach(tiny_vit(dynamic_img_size=True), CONFIG))
    x = images("vit", size=size)
    whole = model(x)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_beside_prompts_and_after_merging(build):
    """Prompts in the stream are prefix tokens; merging keeps the bypass and folds what it can."""
    methods = [CONFIG, dl.VPTConfig(num_tokens=2, deep=False), dl.LoRAConfig(r=2)]
    model = randomize_adapter(dl.attach(build().double(), methods))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    output, grads = backward(model, x)
    assert all(grad.isfinite().all() for grad in grads.values())
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), output, atol=1e-10, rtol=1e-10)
    assert [m for m in merged.modules() if isinstance(m, ConvpassLayer)]


def test_files_and_switching(tmp_path):
    model, x = tiny_swin(), images("swin")
    weights, before = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    randomize_adapter(dl.attach(model, CONFIG, "a"))
    output = model(x)
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, tiny_swin())(x), output)
    dl.attach(model, dl.LoRAConfig(r=2), "b")
    dl.set_adapter(model, "a")
    assert torch.equal(model(x), output)
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert_same(model.state_dict(), weights, atol=0, rtol=0)


def test_errors():
    for settings, message in (
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"conv_init": "zero"}, "conv_init must be one of"),
        ({"branches": ()}, "branches must be some of"),
        ({"dropout": 1.0}, "dropout must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            dl.ConvpassConfig(**settings)
    with pytest.raises(TypeError, match=r"Convpass needs the slot 'attention\.parallel', which ConvNeXtBlock"):
        dl.attach(tiny_convnext(), dl.ConvpassConfig())
    with pytest.raises(TypeError, match="Convpass needs the slot"):
        dl.attach(MODELS["resnet"](), dl.ConvpassConfig())
    layer = ConvpassLayer(24, 3)
    with pytest.raises(TypeError, match="plain sequence"):
        layer(torch.randn(1, 4, 24), torch.randn(1, 4, 24), Sequence())
