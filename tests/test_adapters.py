"""Adapter, AdaptFormer and LoRand in whole networks: places, starts, exact shortcuts, lifecycle, combinations."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from models import (
    CLASSES,
    MODELS,
    assert_same,
    backward,
    images,
    randomize_adapter,
    tiny_convnext,
    tiny_resnet,
    tiny_swin,
    tiny_vit,
)
from test_exact_shortcuts import ARCHITECTURES, EXACT, Full, rows_of_last_mlp

import deltalens as dl
from deltalens.methods import AdapterConfig, AdaptFormerConfig, LoRandConfig
from deltalens.methods.bottleneck import Bottleneck, SerialBottleneck
from deltalens.methods.lorand import LoRandLayer, LowRankSum

CONFIGS = {
    "houlsby": AdapterConfig(bottleneck=4),
    "pfeiffer, relu, scaled": AdapterConfig(
        bottleneck=4, placement="pfeiffer", activation="relu", scale=0.5, dropout=0.1
    ),
    "parallel, norm": AdapterConfig(reduction=4, parallel=True),
    "parallel, stream": AdapterConfig(bottleneck=3, parallel=True, reads="stream", init="official"),
    "adaptformer": AdaptFormerConfig(bottleneck=4),
    "adaptformer, serial": AdaptFormerConfig(bottleneck=4, form="serial"),
    "lorand": LoRandConfig(branches=2, rank=2),
    "lorand, wide": LoRandConfig(branches=4, rank=16),
}
SERIAL = ("pfeiffer, relu, scaled", "adaptformer, serial")
EVERYWHERE = [(family, name) for family in ("vit", "swin") for name in CONFIGS]
EVERYWHERE += [("convnext", name) for name in ("houlsby", "lorand", *SERIAL)] + [("resnet", name) for name in SERIAL]
each_pair = pytest.mark.parametrize(("family", "name"), EVERYWHERE)


def adapted(family, name, **sizes):
    return randomize_adapter(dl.attach(MODELS[family](**sizes), CONFIGS[name]))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, (Bottleneck, LoRandLayer))]


# ------------------------------------------------------------------ what is computed
def vit_by_hand(model, x, config, change):
    """A plain pre-norm ViT with `change(block index, branch, input)` at the places that the configuration names."""
    branches = ("attention", "mlp") if config.placement == "houlsby" else ("mlp",)
    x = model._pos_embed(model.patch_embed(x))
    for i, block in enumerate(model.blocks):
        for branch, norm, body in (("attention", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
            n = norm(x)
            u = body(n)
            if branch in branches and config.parallel:
                u = u + change(i, branch, n if config.reads == "norm" else x)
            elif branch in branches:
                u = u + change(i, branch, u)
            x = x + u
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("reads", ["norm", "stream"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_adapter_on_vit(parallel, placement, reads, activation):
    config = AdapterConfig(
        bottleneck=5, placement=placement, parallel=parallel, reads=reads, activation=activation, scale=0.7, dropout=0.3
    )
    model, x = tiny_vit().double(), images("vit").double()
    randomize_adapter(dl.attach(model, config))
    tensors = {name: p for name, p in model.named_parameters() if ".delta." in name}

    def change(i, branch, u):
        slot = f"blocks.{i}.delta.{branch}_{'parallel' if parallel else 'inner'}.adapter_default.adapter"
        down, up = ({leaf: tensors[f"{slot}.{side}.{leaf}"] for leaf in ("weight", "bias")} for side in ("down", "up"))
        hidden = F.linear(u, down["weight"], down["bias"])
        hidden = F.gelu(hidden) if activation == "gelu" else hidden.clamp(min=0)
        return 0.7 * F.linear(hidden, up["weight"], up["bias"])

    assert len(tensors) == 4 * 3 * (2 if placement == "houlsby" else 1)
    torch.testing.assert_close(model(x), vit_by_hand(model, x, config, change), **EXACT)


@each_pair
def test_starts_as_the_backbone_or_as_said(family, name):
    model, x = MODELS[family](), images(family)
    before = model(x)
    dl.attach(model, CONFIGS[name])
    identity = name not in ("parallel, stream", "lorand", "lorand, wide")
    same = torch.allclose(model(x), before, atol=1e-5)
    assert same == identity
    for layer in layers_of(model):
        if isinstance(layer, Bottleneck):
            assert not layer.down.bias.any()
            assert not layer.up.bias.any()
            assert layer.down.weight.any()
            assert bool(layer.up.weight.any()) != identity
    dl.detach(model)
    assert torch.equal(model(x), before)


def test_initial_values():
    official = SerialBottleneck(400, 200, init="official")
    assert official.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert official.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    lora = SerialBottleneck(400, 200, init="lora")
    assert lora.down.weight.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert not lora.up.weight.any()
    project = LowRankSum(400, 100, 3, 16)
    for tensor, fan_in in ((project.A, 16), (project.g, 16), (project.B, 100), (project.bias, 400)):
        assert tensor.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert tensor.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)
    model, x = tiny_swin(), images("swin")
    before = model(x)
    dl.attach(model, LoRandConfig(branches=2, rank=2, init="identity"))
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_dropout_is_active_in_training_only():
    layer = SerialBottleneck(8, 8, dropout=0.5, init="official")
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    model = dl.attach(tiny_vit(proj_drop_rate=0.5), AdaptFormerConfig())
    model.train()
    assert all(layer.dropout.training for layer in layers_of(model))
    assert not model.blocks[0].mlp.drop1.training


# ------------------------------------------------------------------ LoRand's fast form
@pytest.mark.parametrize("sizes", [(96, 48, 4, 8), (192, 96, 4, 8), (64, 32, 2, 2), (24, 12, 4, 16), (33, 7, 3, 2)])
def test_low_rank_sum_equals_the_published_form(sizes):
    layer = LowRankSum(*sizes).double()
    expected = {}
    for form in (layer.plain, layer):
        layer.zero_grad()
        x = torch.randn(5, 3, sizes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        y = form(x)
        y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
        found = {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}
        expected = expected or found
    assert_same(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sizes", [(4, 16), (1, 2)], ids=["full matrix", "thin layers"])
def test_lorand_merged(sizes):
    """Folded layers compute the same, and hold no more numbers than the cheaper form needs."""
    model, x = tiny_vit().double(), images("vit").double()
    dl.attach(model, LoRandConfig(*sizes))
    randomize_adapter(model)
    (wide,) = {layer.project1.narrow() for layer in layers_of(model)}
    expected = model(x)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), expected, **EXACT)
    assert not layers_of(merged)
    (folded, *_) = [module for _, module in merged.blocks[0].delta.of("default")]
    weights = sum(p.numel() for p in folded.project1.parameters()) - 12
    assert wide == (sizes == (1, 2))
    assert weights == (2 * (24 + 12) if wide else 24 * 12)


def test_low_rank_sum_takes_the_cheaper_way():
    """Multiplications per position, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    for sizes, narrow in (((96, 48, 4, 8), False), ((192, 96, 4, 8), True), ((96, 48, 2, 8), True)):
        layer, x = LowRankSum(*sizes), torch.randn(4096, sizes[0])
        assert layer.narrow() == narrow
        with FlopCounterMode(display=False) as fast:
            layer(x)
        with FlopCounterMode(display=False) as plain:
            layer.plain(x)
        ratio = fast.get_total_flops() / plain.get_total_flops()
        assert ratio < 1.001
        assert (ratio < 0.8) == narrow


# ------------------------------------------------------------------ the last block's class row
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_row_equals_all_rows(architecture, name):
    model, x = tiny_vit(**ARCHITECTURES[architecture]).double(), images("vit").double()
    dl.attach(model, CONFIGS[name])
    randomize_adapter(model)
    assert rows_of_last_mlp(model, x) == 1
    found, grads = backward(model, x)
    expected, full_grads = backward(Full(model), x)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same({f"model.{name}": g for name, g in grads.items()}, full_grads, **EXACT)


# ------------------------------------------------------------------ lifecycle
@each_pair
def test_train_detach_save_and_load(family, name, tmp_path):
    model, x = MODELS[family](), images(family)
    before, state = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    dl.attach(model, CONFIGS[name], num_classes=7)
    randomize_adapter(model)
    _, gradients = backward(model.train(), x)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    y = model.eval()(x)
    assert y.shape == (2, 7)
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, model=MODELS[family]())(x), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_switching(family):
    model, x = MODELS[family](), images(family)
    plain, outputs = model(x), {}
    for i, name in enumerate(CONFIGS):
        dl.attach(model, CONFIGS[name], name=str(i), num_classes=CLASSES + i)
        outputs[str(i)] = randomize_adapter(model, seed=i)(x)
    for name in sorted(outputs, reverse=True):
        dl.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), plain)
    dl.detach(model)
    assert torch.equal(model(x), plain)


@each_pair
def test_autocast(family, name):
    """bfloat16 is as near to float32 as the frozen network's own bfloat16 allows."""
    model, x = adapted(family, name), images(family)
    expected, _ = backward(model, x)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("vit", ("houlsby", "parallel, norm", "adaptformer", "lorand")),
        pytest.param("swin", ("houlsby", "parallel, stream", "adaptformer", "lorand, wide"), marks=pytest.mark.slow),
        pytest.param("convnext", ("houlsby", "adaptformer, serial", "lorand"), marks=pytest.mark.slow),
        pytest.param("resnet", SERIAL, marks=pytest.mark.slow),
    ],
)
def test_compile_and_export(family, names):
    torch.compiler.reset()
    sizes = {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}.get(family, {})
    model, x = MODELS[family](**sizes), images(family)
    dl.attach(model, [CONFIGS[name] for name in names])
    randomize_adapter(model)
    expected, gradients = backward(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, compiled_gradients = backward(compiled, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    compiled_gradients = {key.removeprefix("_orig_mod."): g for key, g in compiled_gradients.items()}
    assert_same(compiled_gradients, gradients, atol=1e-4, rtol=1e-3)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_checkpointing(family):
    names = ("houlsby", "lorand") if family == "convnext" else ("houlsby", "adaptformer", "lorand")
    model, x = MODELS[family](), images(family)
    dl.attach(model, [CONFIGS[name] for name in names])
    randomize_adapter(model)
    expected, gradients = backward(model, x)
    model.set_grad_checkpointing()
    found, again = backward(model, x)
    torch.testing.assert_close(found, expected)
    assert_same(again, gradients, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------ combinations
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_with_prompts_and_lora(family, deep, tmp_path):
    """All gradients arrive, files hold all, and the combination is not one of its parts."""
    config = [
        dl.VPTConfig(num_tokens=2, deep=deep),
        dl.LoRAConfig(r=2, parts=("q", "v", "fc1")),
        *(CONFIGS[name] for name in ("houlsby", "adaptformer", "lorand")),
        dl.NormTuningConfig(),
    ]
    model, x = MODELS[family](), images(family)
    before = model(x)
    dl.attach(model, config)
    randomize_adapter(model)
    y, gradients = backward(model, x)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert {re.split(r"adapter_default\.", n)[1].split(".")[0] for n in gradients if "adapter_default" in n} == {
        "vpt", "lora", "adapter", "adaptformer", "lorand"}  # fmt: skip
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, model=MODELS[family]())(x), y)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), y, atol=1e-4, rtol=1e-4)
    dl.detach(model)
    assert torch.equal(model(x), before)


def test_two_adapters_of_one_kind_are_chained():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, CONFIGS["houlsby"], name="a")
    randomize_adapter(model, 1)
    dl.attach(model, CONFIGS["houlsby"], name="b")
    randomize_adapter(model, 2)
    outputs = {}
    for names in (("a", "b"), ("b", "a")):
        dl.set_adapter(model, names)
        outputs[names] = model.forward_features(x)
    assert not torch.allclose(outputs["a", "b"], outputs["b", "a"], atol=1e-4)


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (tiny_resnet, AdapterConfig(), r"set placement to pfeiffer.*UnknownBlock.*layer1\.0.*offers: block\.stream"),
        (tiny_resnet, AdapterConfig(placement="pfeiffer", parallel=True), r"set parallel to False.*mlp\.parallel"),
        (tiny_convnext, AdapterConfig(parallel=True), r"set parallel to False.*ConvNeXtBlock.*stages\.0"),
        (tiny_convnext, AdaptFormerConfig(), r"set form to serial.*mlp\.parallel.*ConvNeXtBlock"),
        (tiny_resnet, LoRandConfig(), r"LoRand needs the slot 'attention\.inner'"),
    ],
)
def test_blocks_without_the_slot(build, config, message):
    model = build()
    with pytest.raises(TypeError, match=message):
        dl.attach(model, config)
    assert not any("delta" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (AdapterConfig, {"bottleneck": 0}, "at least 1"),
        (AdapterConfig, {"reduction": 0}, "at least 1"),
        (AdapterConfig, {"bottleneck": 4, "reduction": 4}, "not both"),
        (AdapterConfig, {"placement": "both"}, "houlsby.*pfeiffer"),
        (AdapterConfig, {"reads": "x"}, "norm.*stream"),
        (AdapterConfig, {"init": "zero"}, "identity.*official"),
        (AdapterConfig, {"dropout": 1.0}, r"\[0, 1\)"),
        (AdaptFormerConfig, {"bottleneck": 0}, "at least 1"),
        (AdaptFormerConfig, {"form": "both"}, "parallel.*serial"),
        (AdaptFormerConfig, {"dropout": -0.1}, r"\[0, 1\)"),
        (LoRandConfig, {"branches": 0}, "branches must be at least 1"),
        (LoRandConfig, {"rank": 0}, "rank must be at least 1"),
    ],
)
def test_refused_settings(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_reduction_too_large_for_a_stage():
    for config in (AdapterConfig(reduction=16), LoRandConfig(reduction=16)):
        model = tiny_swin()
        with pytest.raises(ValueError, match="leaves nothing of a stream of 12 channels"):
            dl.attach(model, config)


def test_presets():
    assert AdapterConfig.houlsby().placement == "houlsby"
    assert AdapterConfig.vpt_baseline(64) == AdapterConfig(reduction=64, placement="pfeiffer")
    mona = AdapterConfig.mona_baseline()
    assert (mona.bottleneck, mona.dropout, mona.init, mona.activation) == (64, 0.1, "official", "gelu")
    assert AdapterConfig.pfeiffer(8).activation == "relu"
    assert AdaptFormerConfig.mona_baseline() == AdaptFormerConfig(activation="gelu", init="official")
    assert [(c.branches, c.rank) for c in (LoRandConfig.lorand(), LoRandConfig.lorand_plus(),
                                           LoRandConfig.lorand_plus_plus())] == [(2, 8), (4, 8), (4, 16)]  # fmt: skip
