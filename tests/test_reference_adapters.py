"""Adapter, AdaptFormer, LoRand of Mona's comparison and VPT's adapter against the published implementations."""

import pytest
import reference
import torch
import torch.nn.functional as F
from test_reference_vpt import gradient_close, official
from test_reference_vpt import tiny_vit as vpt_vit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn

import deltalens as dl
from deltalens.methods.adapter import AdapterConfig
from deltalens.methods.adaptformer import AdaptFormerConfig
from deltalens.methods.bottleneck import ParallelBottleneck, SerialBottleneck
from deltalens.methods.lorand import LoRandLayer

TOLERANCE = {torch.float64: ("_f64", 1e-9, 1e-10), torch.float32: ("", 1e-4, 1e-3)}
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
SIDES = {"project1": "down", "project2": "up"}


def close(found, expected, dtype):
    _, rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=atol)


def ours(name: str) -> str:
    head, _, rest = name.partition(".")
    return f"{SIDES[head]}.{rest}"


def compare(tensors, dtype, call, named_gradients):
    """Output, gradient of the input, and of every parameter given as (official name, parameter)."""
    suffix = TOLERANCE[dtype][0]
    x = tensors["input"].to(dtype).requires_grad_()
    y = call(x)
    close(y, tensors[f"output{suffix}"], dtype)
    (y * tensors["cotangent"].to(dtype)).sum().backward()
    close(x.grad, tensors[f"grad{suffix}.input"], dtype)
    expected = reference.sub(tensors, f"grad{suffix}.")
    named_gradients = dict(named_gradients)
    assert named_gradients.keys() == expected.keys() - {"input"}
    for name, gradient in named_gradients.items():
        close(gradient(), expected[name], dtype)


def test_an_unlike_bottleneck_is_caught():
    """The comparison below would notice tanh-GELU, the smallest of the likely mistakes."""
    tensors, _ = reference.load("adapter_houlsby_d96")
    down, up = (F.linear, F.linear)
    p = reference.sub(tensors, "param.")
    hidden = F.gelu(down(tensors["input"], p["project1.weight"], p["project1.bias"]), approximate="tanh")
    wrong = tensors["input"] + up(hidden, p["project2.weight"], p["project2.bias"])
    with pytest.raises(AssertionError):
        close(wrong, tensors["output_f64"], torch.float64)


# ------------------------------------------------------------------ the layers
@both_precisions
def test_adapter(dtype):
    tensors, _ = reference.load("adapter_houlsby_d96")
    layer = SerialBottleneck(96, 64, "gelu", 1.0, 0.1, "official").to(dtype).eval()
    layer.load_state_dict({ours(key): value for key, value in reference.sub(tensors, "param.").items()})
    names = [f"{p}.{leaf}" for p in SIDES for leaf in ("weight", "bias")]
    compare(tensors, dtype, layer, [(n, lambda n=n: layer.get_parameter(ours(n)).grad) for n in names])
    assert sum(p.numel() for p in layer.parameters()) == 12_448


@both_precisions
def test_adaptformer(dtype):
    tensors, _ = reference.load("adaptformer_adapter_d96")
    layer = ParallelBottleneck(96, 64, "gelu", 0.1, 0.1, "official").to(dtype).eval()
    layer.load_state_dict({ours(key): value for key, value in reference.sub(tensors, "param.").items()})
    names = [f"{p}.{leaf}" for p in SIDES for leaf in ("weight", "bias")]
    nothing = torch.full((), float("nan"))  # norm(x) must not be read
    compare(
        tensors,
        dtype,
        lambda x: layer(x, nothing),
        [(n, lambda n=n: layer.get_parameter(ours(n)).grad) for n in names],
    )


@both_precisions
@pytest.mark.parametrize("name", ["lorand_d96_b4k8", "lorand_d96_b2k8"])
def test_lorand(name, dtype):
    """96 x 48: four branches of rank 8 cost as much as the full matrix, two cost less; both ways are compared."""
    tensors, meta = reference.load(name)
    branches, rank = int(meta["num_branch"]), int(meta["kernel_dim"])
    layer = LoRandLayer(96, branches, rank).to(dtype).eval()
    assert layer.project1.narrow() == (branches == 2)
    gradients = []
    with torch.no_grad():
        for side in SIDES:
            project = layer.get_submodule(side)
            project.bias.copy_(tensors[f"param.{side}.bias"])
            gradients.append((f"{side}.bias", lambda project=project: project.bias.grad))
            for factor in "AgB":
                for i in range(branches):
                    path = f"{side}.param_dict.{factor}{i}"
                    project.get_parameter(factor)[i] = tensors[f"param.{path}"]
                    gradients.append((path, lambda p=project, f=factor, i=i: p.get_parameter(f).grad[i]))
    compare(tensors, dtype, layer, gradients)
    assert sum(p.numel() for p in layer.parameters()) == int(meta["n_params"])


# ------------------------------------------------------------------ their places in a block
class MlpHalf(nn.Module):
    """The second half of an adapted Swin block: the block with an attention branch that adds nothing."""

    def __init__(self, config, tensors, dtype):
        super().__init__()
        model = SwinTransformer(
            img_size=(20, 28), patch_size=4, window_size=7, embed_dim=48, depths=(1,), num_heads=(4,), num_classes=2
        )
        dl.attach(model, config)
        self.model = model.to(dtype).eval()
        self.block = model.layers[0].blocks[0]
        assert isinstance(self.block, SwinTransformerBlock)
        with torch.no_grad():
            self.block.attn.proj.weight.zero_()
            self.block.attn.proj.bias.zero_()
            for path, parameter in self.official().items():
                parameter.copy_(tensors[f"param.{path}"])
                parameter.requires_grad_(True)

    def official(self):
        names = [f"{layer}.{leaf}" for layer in ("norm2", "mlp.fc1", "mlp.fc2") for leaf in ("weight", "bias")]
        found = {name: self.block.get_parameter(name) for name in names}
        ((_, adapter),) = [(slot, m) for slot, m in self.block.delta.of("default") if slot.startswith("mlp")]
        return found | {
            f"my_module.{side}.{leaf}": adapter.get_parameter(f"{SIDES[side]}.{leaf}")
            for side in SIDES
            for leaf in ("weight", "bias")
        }

    def forward(self, x):
        return self.block(x.unflatten(1, (5, 7))).flatten(1, 2)


@both_precisions
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mlpblock_houlsby_d48", AdapterConfig(bottleneck=64, placement="pfeiffer", init="official")),
        ("mlpblock_adaptformer_d48", AdaptFormerConfig.mona_baseline()),
    ],
)
def test_place_in_the_block(name, config, dtype):
    tensors, _ = reference.load(name)
    half = MlpHalf(config, tensors, dtype)
    parameters = half.official()
    compare(tensors, dtype, half, [(n, lambda p=p: p.grad) for n, p in parameters.items()])


# ------------------------------------------------------------------ VPT's adapter in its ViT
def test_vpt_adapter():
    tensors, _ = reference.load("vpt_adapter_r8")
    model = dl.attach(vpt_vit(), AdapterConfig.vpt_baseline(8)).eval()
    loaded, ignored = dl.import_official(model, official(tensors), source="vpt_adapter")
    assert (loaded, ignored) == (4 * 4 + 2, 0)
    x = tensors["input.image"]
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, tensors["out.feature"], atol=2e-5, rtol=1e-4)
    logits = model(x)
    torch.testing.assert_close(logits, tensors["out.logits"], atol=2e-5, rtol=1e-4)
    F.cross_entropy(logits, tensors["input.target"]).backward()
    places = {"adapter_downsample": "down", "adapter_upsample": "up"}
    compared = 0
    for i, block in enumerate(model.blocks):
        ((_, adapter),) = block.delta.of("default")
        for theirs, side in places.items():
            for leaf in ("weight", "bias"):
                expected = tensors[f"grad.enc.transformer.encoder.layer.{i}.{theirs}.{leaf}"]
                gradient_close(adapter.get_parameter(f"{side}.{leaf}").grad, expected)
                compared += 1
    assert compared == 16


def test_the_all_zero_start_of_vpts_code_would_learn_a_bias_only():
    """Why it is not offered."""
    model = dl.attach(vpt_vit(), AdapterConfig.vpt_baseline(8))
    adapters = [module for block in model.blocks for _, module in block.delta.of("default")]
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])

    def moved(start):
        for adapter in adapters:
            for name, parameter in adapter.named_parameters():
                start(name, parameter)
        optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=0.01, weight_decay=0)
        before = [{n: p.detach().clone() for n, p in a.named_parameters()} for a in adapters]
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        return {
            n for a, old in zip(adapters, before, strict=True) for n, p in a.named_parameters() if (p != old[n]).any()
        }

    assert moved(lambda name, parameter: None) == {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert moved(lambda name, parameter: nn.init.zeros_(parameter)) == {"up.bias"}


# ------------------------------------------------------------------ names of the official checkpoints
def tiny_swin():
    return SwinTransformer(
        img_size=56, patch_size=4, window_size=7, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=3
    ).eval()


NAMES = {
    "mona_adapter": (
        dl.AdapterConfig.mona_baseline(),
        {
            "attention_inner.adapter.down": ("my_module_1.project1", "adapter1.project1"),
            "attention_inner.adapter.up": ("my_module_1.project2", "adapter1.project2"),
            "mlp_inner.adapter.down": ("my_module_2.project1", "adapter2.project1"),
            "mlp_inner.adapter.up": ("my_module_2.project2", "adapter2.project2"),
        },
    ),
    "mona_adaptformer": (
        dl.AdaptFormerConfig.mona_baseline(),
        {
            "mlp_parallel.adaptformer.down": ("my_module_1.project1", "adapter.project1"),
            "mlp_parallel.adaptformer.up": ("my_module_1.project2", "adapter.project2"),
        },
    ),
}


@pytest.mark.parametrize("repository", [0, 1], ids=["mona", "STAR-MMRotate"])
@pytest.mark.parametrize("source", NAMES)
def test_import_by_names(source, repository):
    from deltalens.lifecycle.tensors import adapter_tensors

    config, names = NAMES[source]
    model = dl.attach(tiny_swin(), config)
    state, expected = {"backbone.patch_embed.proj.weight": torch.zeros(1)}, {}
    for key, tensor in adapter_tensors(model).items():
        if key.startswith("head."):
            continue
        prefix = next(place for place in names if f".{place}." in key)
        value = torch.randn(tensor.shape)
        theirs = key.replace(prefix, names[prefix][repository])
        state["backbone." + (theirs.replace("layers", "stages") if repository else theirs)] = expected[key] = value
    assert dl.import_official(model, state, source=source) == (len(expected), 1)
    found = adapter_tensors(model)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_import_lorand():
    from deltalens.lifecycle.tensors import adapter_tensors

    model = dl.attach(tiny_swin(), dl.LoRandConfig.lorand_plus())
    state = {}
    for stage, width in enumerate((16, 32)):
        for place in (1, 2):
            for project, (into, out) in {"project1": (width, width // 2), "project2": (width // 2, width)}.items():
                path = f"backbone.stages.{stage}.blocks.0.lorand{place}.{project}"
                state[f"{path}.bias"] = torch.randn(out)
                for i in range(4):
                    for factor, shape in {"A": (into, 8), "g": (8, 8), "B": (8, out)}.items():
                        state[f"{path}.param_dict.{factor}{i}"] = torch.randn(shape)
    loaded, ignored = dl.import_official(model, state, source="mona_lorand")
    assert (loaded, ignored) == (2 * 2 * 2 * 4, 0)
    found = adapter_tensors(model)
    for i in range(4):
        theirs = state[f"backbone.stages.1.blocks.0.lorand2.project2.param_dict.g{i}"]
        assert torch.equal(found["layers.1.blocks.0.mlp_inner.lorand.project2.g"][i], theirs)


@pytest.mark.parametrize(
    ("source", "config"), [("vpt_side", dl.SidetuneConfig(pretrained=False)), ("vpt_mlp", dl.MLPConfig())]
)
def test_import_side_network_and_mlp_head(source, config):
    from deltalens.lifecycle.tensors import adapter_tensors

    model = dl.attach(vpt_vit(), config)
    ours = {"vpt_side": {"output.sidetune.": "side.", "head.": "head.last_layer."}, "vpt_mlp": {}}[source]
    state = {}
    for key, tensor in adapter_tensors(model).items():
        theirs = key
        for prefix, replacement in ours.items():
            if key.startswith(prefix):
                theirs = key.replace(prefix, replacement, 1)
        theirs = theirs.replace("side.alpha", "side_alpha").replace("side.projection", "side_projection")
        state[theirs] = torch.randn(tensor.shape).to(tensor.dtype)
    names = set(reference.load_json("vpt_trainable_sets")["vit|side"])
    if source == "vpt_side":
        assert state.keys() == names
    else:
        assert {"head.projection.0.weight", "head.projection.2.running_mean", "head.last_layer.bias"} <= state.keys()
    assert dl.import_official(model, state, source=source) == (len(state), 0)
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(model).values(), state.values(), strict=True))
