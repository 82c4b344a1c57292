"""Adapter-X: the wide form against the loop, prompts, what is trained, the network."""

import math

import pytest
import torch
from adapter_x_models import LABELS, adapted, config, layers, pools, task_of
from matrix import assert_equal_states
from models import (
    assert_same,
    backward,
    gradients,
    images,
    randomize_adapter,
    tiny_convnext,
    tiny_resnet,
    tiny_swin,
    tiny_vit,
)
from torch import nn

import deltalens as dl
from deltalens.methods.smoa import ScaleAndShift, SmallMLP, SMoA, balance
from deltalens.studies.plain_forms import SortedSMoA, looped_smoa


# ------------------------------------------------------------------ the pool
def random_pool(**settings):
    torch.manual_seed(0)
    pool = SMoA(24, settings.pop("heads", 2), settings.pop("experts", 4), 3, 5, **settings).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pool


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heads": 4, "activation": "gelu", "scale": 0.3},
        {"bias": False},
        {"dense": True, "bias": False},
        {"dense": True},
        {"experts": 1},
        {"normalize_tokens": True, "temperature": 0.3},
        {"temperature": 2.0, "learn_temperature": True},
    ],
    ids=str,
)
def test_the_wide_form_is_the_loop(settings):
    pool = random_pool(**settings)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 24, dtype=torch.float64)
    results = []
    for form in (lambda: pool(x)[0], lambda: looped_smoa(pool, x)):
        y = form()
        grads = torch.autograd.grad((y * weights).sum(), [x, *pool.parameters()])
        results.append([y.detach(), *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert all(float(gradient.abs().max()) > 0 for gradient in results[0])
    if "dense" not in settings and pool.experts > 1:
        assert len(pool(x)[1].argmax(-1).unique()) > 1  # several experts take part


def test_sorting_gives_the_same():
    pool, x = random_pool(activation="gelu"), torch.randn(2, 5, 24, dtype=torch.float64)
    expected, probabilities = pool(x)
    pool.__class__ = SortedSMoA
    found, same = pool(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(same, probabilities)


def test_starts():
    pool = SMoA(24, 2, 4, 3, 5)
    assert not any(tensor.any() for tensor in (pool.up, pool.up_bias, pool.down_bias))
    assert float(pool.down.detach().abs().max()) <= 1 / math.sqrt(
        12
    )  # Kaiming-uniform of each expert, not of all as one
    assert float(pool.down.detach().abs().max()) > 0.8 / math.sqrt(12)
    products = pool.router.experts @ pool.router.experts.T
    torch.testing.assert_close(products, 0.32**2 * torch.eye(4), atol=1e-6, rtol=0)
    assert not pool(torch.randn(1, 3, 24))[0].any()


def test_jitter_and_dropout_act_in_training_only():
    pool = random_pool(jitter=0.5, dropout=0.5)
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    assert torch.equal(pool.eval()(x)[1], pool(x)[1])
    assert torch.equal(pool(x)[1], pool.routed(x))
    assert not torch.equal(pool.train()(x)[1], pool(x)[1])
    still = random_pool(dropout=0.5)
    assert torch.equal(still(x)[1], still(x)[1])
    assert not torch.equal(still(x)[0], still(x)[0])


def test_balance_is_1_at_best_and_n_at_worst():
    rows = torch.eye(4, dtype=torch.float64)
    assert float(balance(rows)) == pytest.approx(1)
    assert float(balance(rows[[2, 2, 2]])) == pytest.approx(4)
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64, requires_grad=True)
    value = balance(p)
    assert float(value.detach()) == pytest.approx(2 * (2 / 3 * 1.4 / 3 + 1 / 3 * 1.6 / 3))
    (gradient,) = torch.autograd.grad(value, p)
    torch.testing.assert_close(gradient, torch.tensor([[2 / 3, 1 / 3]] * 3, dtype=torch.float64) * 2 / 3)


def test_generators():
    y = torch.randn(2, 7, 6)
    affine = ScaleAndShift(6, "gelu")
    expected = affine.gamma * nn.functional.gelu(y).mean(1, keepdim=True) + affine.beta
    torch.testing.assert_close(affine(y), expected)
    small = randomize_adapter(SmallMLP(6, None, 3))
    expected = nn.functional.gelu(y.mean(1) @ small.fc1.weight.T + small.fc1.bias) @ small.fc2.weight.T + small.fc2.bias
    torch.testing.assert_close(small(y)[:, 0], expected)


# ------------------------------------------------------------------ counts
def test_published_counts():
    with torch.device("meta"):
        model = dl.create_backbone("timm/vit_base_patch16_224", pretrained=False, num_classes=100)
        for preset in (dl.AdapterXConfig.vit_b(), dl.AdapterXConfig.sequential()):
            dl.attach(model, preset)
            count = dl.count_parameters(model)
            assert count.adapter == 170_816
            assert round(count.percent, 2) == 0.20
            dl.detach(model)
        dl.attach(model, dl.AdapterXConfig())
        assert dl.count_parameters(model).adapter == 170_816 - 2 * 768  # nobody reads the last prompt


def test_the_published_size_on_point_mae():
    """With a head for 15 classes; class token and position are trained anyway, since no file has them."""
    model = dl.create_backbone("points/point-mae", num_classes=15, pretrained=False)
    dl.attach(model, dl.AdapterXConfig.point_mae())
    count = dl.count_parameters(model)
    assert (count.adapter, count.head) == (128_352 + 9_216 + 9_216 + 2 * 384, 267_535)
    assert count.adapter + count.head == 415_087
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 256, 3)).shape == (2, 15)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"shared": False}, 2 * (3 * (2 * 4 * 12 + 4 + 12) + 5 * 12 + 3 * 5)),
        ({"experts": 1}, -(2 * (2 * 4 * 12 + 4 + 12) + 5 * 12 + 3 * 5)),
        ({"prompts": None}, -2 * 2 * 24),
        ({"prompts": "mlp", "prompt_width": 2}, 2 * (2 * 24 * 2 + 2 + 24) - 2 * 2 * 24),
        ({"norm": False}, -3 * 2 * 24),
        ({"class_token": False}, -24),
        ({"bias": False}, -3 * (4 + 12)),
        ({"learn_temperature": True}, 1),
        ({"pool": "prompts"}, 2 * 24),
        ({"last_prompt": True}, 2 * 24),
        ({"dense": True}, 0),
    ],
    ids=str,
)
def test_what_each_switch_trains(settings, difference):
    model = adapted(**settings)
    assert dl.count_parameters(model).adapter - dl.count_parameters(adapted()).adapter == difference
    task = task_of(model).train()
    result = task((images("vit"), LABELS))
    result["loss"].backward()
    found = gradients(model)  # every trained tensor has one
    unread = {name for name, gradient in found.items() if not gradient.any()}
    assert all("blocks.2" in name and "generator" in name for name in unread)
    assert len(unread) == 2 * ("last_prompt" in settings)


# ------------------------------------------------------------------ the network
def plain_vit(model, x, blocks):
    """tiny_vit with Adapter-X, written out. blocks: the modules of the three blocks."""
    net = model
    x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for block, own in zip(net.blocks, blocks, strict=True):
        x = x + block.attn(block.norm1(x))
        u = block.norm2(x)
        if own.config.placement == "parallel":
            y = looped_smoa(own.pool, u)
            x = x + block.mlp(u) + y
        else:
            inner = block.mlp(u)
            y = looped_smoa(own.pool, inner)
            x = x + inner + y
        if own.adds_tokens:
            x = torch.cat([x[:, :1], own.generator(y), x[:, 1:]], 1)
    return net.norm(x)


@pytest.mark.parametrize("placement", ["parallel", "serial"])
def test_the_network_is_the_formula(placement):
    model = adapted(placement=placement, last_prompt=True).double()
    x = images("vit").double()
    expected = model.head(plain_vit(model, x, layers(model))[:, 0])
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    assert model.forward_features(x).shape == (2, 17, 24)  # prompts never leave the tower


def test_a_head_may_read_prompts():
    model = adapted(pool="prompts").double()
    x = images("vit").double()
    prompts = plain_vit(model, x, layers(model))[:, 1:4]
    torch.testing.assert_close(model(x), model.head(prompts.mean(1)), atol=1e-10, rtol=1e-10)


def test_the_class_row_alone_is_exact():
    """The last block computes the class token only; a pass of all tokens gives the same logits and gradients."""
    model = adapted(balance=0.0).double()
    x = images("vit").double()
    output, expected = backward(model, x)
    for layer in layers(model):
        layer.pointwise = False
    found, grads = backward(model, x)
    torch.testing.assert_close(found, output, atol=1e-12, rtol=1e-12)
    assert_same(grads, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_one_pool_per_width_and_no_prompts_on_maps(family):
    model = adapted(family, placement="serial")
    widths = {"swin": 2, "convnext": 4}[family]
    assert len(pools(model)) == widths
    assert not any(layer.adds_tokens for layer in layers(model))
    backward(model, images(family))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_convnext, {}, r"set placement to serial.*mlp\.parallel.*ConvNeXtBlock"),
        (tiny_resnet, {}, r"set placement to serial.*mlp\.parallel.*UnknownBlock"),
        (tiny_vit, {"heads": 5}, "heads=5 does not divide the 24 channels of blocks.0"),
        (tiny_swin, {"pool": "prompts"}, "has no place for"),
    ],
)
def test_refused_where_impossible(make, settings, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        dl.attach(model, config(**settings))
    assert_equal_states(model.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "experts must be at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"balance": -1.0}, "not be negative"),
        ({"jitter": 1.0}, r"\[0, 1\)"),
        ({"placement": "both"}, "parallel.*serial"),
        ({"pool": "prompts", "prompts": None}, "makes none"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
