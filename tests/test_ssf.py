"""SSF: the paper's formula, order with other weight methods, merging, counts, where it is placed."""

import copy

import pytest
import torch
from models import (
    METHODS,
    MODELS,
    assert_same,
    backward,
    images,
    randomize_adapter,
    tiny_resnet,
    tiny_swin,
    tiny_unread,
    tiny_vit,
)
from test_counts import SWIN, VIT_B, count
from torch import nn

import deltalens as dl
from deltalens.lifecycle.tensors import inserted_tensors
from deltalens.methods.ssf import SSFLayer
from deltalens.sites.swap import Swapped

VIT_LAYERS = ["patch_embed.proj", "norm"] + [
    f"blocks.{i}.{layer}"
    for i in range(3)
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
]


def scaled_by_hooks(model: nn.Module, scales: dict[str, torch.Tensor], shifts: dict[str, torch.Tensor]) -> nn.Module:
    """The formula, y' = scale * y + shift after each layer, with nothing of deltalens."""

    def hook(layer, inputs, y):
        shape = (1, -1, 1, 1) if y.dim() == 4 and isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) else (-1,)
        return y * layer.scale.view(shape) + layer.shift.view(shape)

    for path in scales:
        layer = model.get_submodule(path)
        layer.scale, layer.shift = scales[path], shifts[path]
        layer.register_forward_hook(hook)
    return model


def placed(model: nn.Module, leaf: str) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(f".all.ssf.{leaf}"): tensor
        for name, tensor in inserted_tensors(model, "default").items()
        if name.endswith(leaf)
    }


@pytest.mark.parametrize(("build", "layers"), [(tiny_vit, VIT_LAYERS), (tiny_resnet, None)])
def test_the_formula(build, layers):
    model = randomize_adapter(dl.attach(build().double(), dl.SSFConfig())).eval()
    scales, shifts = placed(model, "scale"), placed(model, "shift")
    if layers is not None:
        assert sorted(scales) == sorted(layers)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    output, grads = backward(model, x)
    plain = scaled_by_hooks(
        build().double(),
        {path: t.detach().clone().requires_grad_() for path, t in scales.items()},
        {path: t.detach().clone().requires_grad_() for path, t in shifts.items()},
    )
    plain.get_classifier().load_state_dict(model.get_classifier().state_dict())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).double()
    expected = plain(x)
    (expected * weights).sum().backward()
    torch.testing.assert_close(output, expected.detach(), atol=1e-12, rtol=1e-12)
    found = {name: grad for name, grad in grads.items() if "delta" in name}
    assert len(found) == 2 * len(scales)
    for path in scales:
        own = f"{path}.delta.all.adapter_default.ssf"
        torch.testing.assert_close(found[f"{own}.scale"], plain.get_submodule(path).scale.grad, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(found[f"{own}.shift"], plain.get_submodule(path).shift.grad, atol=1e-10, rtol=1e-8)


def test_counts_of_the_official_code():
    """Counted by building the official models; its layers between stages have scales that are never used."""
    assert count(VIT_B, dl.SSFConfig()).adapter == 205_824
    assert count(SWIN["t"], dl.SSFConfig()).adapter == 99_072
    assert count(SWIN["b"], dl.SSFConfig()).adapter == 267_264
    assert count("convnext_tiny", dl.SSFConfig()).adapter == 94_656
    between = 2 * (384 + 768 + 1536) + 2 * (192 + 384 + 768)  # norm and reduction of three patch mergings
    assert count(SWIN["t"], dl.SSFConfig(exclude=None)).adapter == 99_072 + between
    assert count(VIT_B, dl.SSFConfig(exclude=r".*norm.*|patch_embed.*")).adapter == 2 * 12 * (2304 + 768 + 3072 + 768)


def test_initial_values():
    layer = SSFLayer(100_000)
    for tensor, mean in ((layer.scale, 1.0), (layer.shift, 0.0)):
        assert tensor.mean().item() == pytest.approx(mean, abs=5e-4)
        assert tensor.std().item() == pytest.approx(0.02, rel=0.02)
    model, x = tiny_vit(), images("vit")
    before = model(x)
    dl.attach(model, dl.SSFConfig(std=0.0))
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_merging_leaves_the_plain_model(family):
    plain = MODELS[family]()
    model = randomize_adapter(dl.attach(MODELS[family]().double(), dl.SSFConfig())).eval()
    merged = dl.merge_and_unload(copy.deepcopy(model))
    x = images(family).double()
    torch.testing.assert_close(merged(x), model(x), atol=1e-10, rtol=1e-10)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert not any(isinstance(m, Swapped) for m in merged.modules())
    new = merged.state_dict().keys() - plain.state_dict().keys()
    without_bias = {f"{n}.bias" for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.bias is None}
    assert new == (without_bias if family == "resnet" else set())


def test_a_missing_bias_is_made_in_merging():
    model = randomize_adapter(dl.attach(tiny_vit(qkv_bias=False).double(), dl.SSFConfig())).eval()
    x = images("vit").double()
    expected = model(x)
    merged = dl.merge_and_unload(model)
    assert merged.blocks[0].attn.qkv.bias is not None
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ with other methods on the same layer
@pytest.mark.parametrize("first", ["lora", "ssf"])
@pytest.mark.parametrize("as_adapters", [False, True])
def test_order_with_lora(first, as_adapters):
    """What is attached first acts first: s (Wx + BAx) + t, or (s Wx + t) + BAx. Merged in the same order."""
    configs = {"lora": dl.LoRAConfig(r=2, parts=("q", "v")), "ssf": dl.SSFConfig(exclude=r".*(norm|mlp|proj).*")}
    names = ["lora", "ssf"] if first == "lora" else ["ssf", "lora"]
    model = tiny_vit(depth=1).double()
    if as_adapters:
        for name in names:
            randomize_adapter(dl.attach(model, configs[name], name))
        dl.set_adapter(model, names)
    else:
        dl.attach(model, [configs[name] for name in names])
    model.requires_grad_(True)
    randomize_adapter(model)
    qkv = model.blocks[0].attn.qkv
    modules = {type(m).__name__ + str(i): m for i, m in enumerate(m for *_, m in qkv.delta.changes())}
    assert len(modules) == 3
    ssf = next(m for m in modules.values() if isinstance(m, SSFLayer))
    q, v = [m for m in modules.values() if not isinstance(m, SSFLayer)]
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    plain = torch.nn.functional.linear(x, qkv.weight, qkv.bias)
    change = torch.cat([q(x), torch.zeros_like(q(x)), v(x)], -1)
    if first == "lora":
        expected = ssf.scale * (plain + change) + ssf.shift
    else:
        expected = ssf.scale * plain + ssf.shift + change
    torch.testing.assert_close(qkv(x), expected, atol=1e-12, rtol=1e-12)
    pixels = images("vit").double()
    output = model(pixels)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged.blocks[0].attn.qkv(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(merged(pixels), output, atol=1e-10, rtol=1e-10)


def test_rows_of_a_fused_layer():
    """The last ViT block asks for query and key-value rows apart, prompts for keys and values only."""
    methods = [dl.SSFConfig(), dl.VPTConfig(num_tokens=3), dl.LoRAConfig(r=2, parts=("q", "v"))]
    model = randomize_adapter(dl.attach(tiny_vit().double(), methods))
    x = images("vit").double()
    output, grads = backward(model, x)
    pooled = model.forward_features(x)  # which computes all rows of all blocks
    torch.testing.assert_close(model.head(pooled[:, 0]), output, atol=1e-12, rtol=1e-12)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), output, atol=1e-10, rtol=1e-10)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_one_model_with_everything_on_it():
    names = ["ssf", "fact", "repadapter", "convpass", "mona", "lora", "vpt-deep"]
    model = randomize_adapter(dl.attach(tiny_vit().double(), [METHODS[name] for name in names])).eval()
    x = images("vit").double()
    expected = model(x)
    torch.testing.assert_close(dl.merge_and_unload(copy.deepcopy(model))(x), expected, atol=1e-10, rtol=1e-10)
    for seed, name in enumerate(names):
        dl.attach(model, METHODS[name], name)
        randomize_adapter(model, seed)
    alone = {}
    for name in names:
        dl.set_adapter(model, name)
        alone[name] = model(x)
    dl.set_adapter(model, "default")
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    dl.delete_adapter(model, "ssf")
    dl.set_adapter(model, "fact")
    torch.testing.assert_close(model(x), alone["fact"], atol=0, rtol=0)


# ------------------------------------------------------------------ where it goes
def test_layers_that_nobody_calls_are_passed_over():
    model = dl.attach(tiny_unread(), dl.SSFConfig())
    paths = list(placed(model, "scale"))
    assert "layers.0.blocks.0.attn.proj" in paths
    assert not [path for path in paths if path.endswith("qkv")]  # the attention reads its weight

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            y = self.norm(x)
            return x + self.attn(y, y, y)[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 8, 8), nn.Sequential(Block(), Block())
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    model = dl.attach(Net(), dl.SSFConfig())
    assert sorted(placed(model, "scale")) == ["blocks.0.norm", "blocks.1.norm", "stem"]


def test_special_layers():
    """qk-norms and norms without bias are scaled; norms with an activation inside are not."""
    from timm.layers import BatchNormAct2d, LayerNorm2d

    from deltalens.sites.weights import output_channels

    model = dl.attach(tiny_vit(qk_norm=True, class_token=False, global_pool="avg"), dl.SSFConfig())
    assert {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "fc_norm"} <= placed(model, "scale").keys()
    assert output_channels(BatchNormAct2d(4)) is None
    assert output_channels(nn.LayerNorm((4, 4))) is None
    assert output_channels(nn.LayerNorm(4, elementwise_affine=False)) is None
    assert output_channels(LayerNorm2d(4)) == (4, 1)
    assert output_channels(nn.GroupNorm(2, 4)) == (4, 1)
    assert output_channels(nn.ReLU()) is None


def test_files_and_detaching(tmp_path):
    model, x = tiny_swin(), images("swin")
    before, weights = model(x), copy.deepcopy(model.state_dict())
    dl.attach(model, dl.SSFConfig(), "a")
    randomize_adapter(model)
    output = model(x)
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, tiny_swin())
    assert torch.equal(again(x), output)
    dl.attach(model, dl.LoRAConfig(r=2), "b")
    with dl.disable_adapter(model):
        assert torch.equal(model(x), before)
    dl.set_adapter(model, "a")
    assert torch.equal(model(x), output)
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert_same(model.state_dict(), weights, atol=0, rtol=0)


def test_wrong_settings():
    with pytest.raises(ValueError, match="std must not be negative"):
        dl.SSFConfig(std=-0.1)
    with pytest.raises(ValueError, match="matches nothing"):
        dl.attach(tiny_vit(), dl.SSFConfig(exclude=".*"))
