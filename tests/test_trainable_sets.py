"""Which backbone tensors NormTuning, BitFit and Partial-k train, against the published codes' own name tests."""

import copy
import re

import pytest
import reference
import torch
from models import (
    MODELS,
    assert_same,
    backward,
    images,
    randomize_adapter,
    tiny_convnext,
    tiny_resnet,
    tiny_swin,
    tiny_swin_v2,
    tiny_vit,
)
from test_exact_shortcuts import ARCHITECTURES, EXACT, Full, rows_of_last_mlp
from timm.models.levit import Levit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, NormTuningConfig, PartialConfig
from deltalens.sites.norms import is_norm


def trained(model, config) -> set[str]:
    dl.attach(model, config)
    found = {row.name for row in dl.parameter_table(model) if row.kind == "unfrozen"}
    dl.detach(model)
    return found


# ------------------------------------------------------------------ VPT's sets
VIT_NAMES = (
    (r"transformer\.embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"transformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"transformer\.embeddings\.cls_token", "cls_token"),
    (r"transformer\.encoder\.encoder_norm", "norm"),
    (r"transformer\.encoder\.layer", "blocks"),
    ("attention_norm", "norm1"),
    ("ffn_norm", "norm2"),
    (r"attn\.(query|key|value)", "attn.qkv"),
    (r"attn\.out", "attn.proj"),
    (r"ffn\.", "mlp."),
)


def in_timm(family: str, name: str) -> str:
    """Official name -> timm's; q, k and v become one."""
    name = name.removeprefix("enc.")
    for pattern, replacement in VIT_NAMES if family == "vit" else ():
        name = re.sub(pattern, replacement, name)
    if family == "swin":
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
    return name


def vpt_backbone(family: str) -> nn.Module:
    if family == "swin":
        return SwinTransformer(
            img_size=64, patch_size=4, window_size=4, embed_dim=12, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8)
        )
    mae = {"global_pool": "avg", "fc_norm": True} if family == "mae" else {}
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=4, **mae)


PUBLISHED = {
    "linear": dl.LinearConfig(),
    "end2end": dl.FullConfig(),
    "tinytl-bias": BitFitConfig(),
    "partial-1": PartialConfig(blocks=1),
    "partial-2": PartialConfig(blocks=2),
    "partial-4": PartialConfig(blocks=4),
}


@pytest.mark.parametrize("family", ["vit", "swin", "mae"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_vpt(family, kind):
    names = reference.load_json("vpt_trainable_sets")[f"{family}|{kind}"]
    expected = {in_timm(family, name) for name in names if not name.startswith("head.")}
    model = vpt_backbone(family)
    assert expected <= {name for name, _ in model.named_parameters()}
    assert trained(model, PUBLISHED[kind]) == expected


# ------------------------------------------------------------------ Partial
def test_partial_without_the_final_norm():
    assert trained(tiny_vit(), PartialConfig(blocks=2)) - trained(tiny_vit(), PartialConfig(2, final_norm=False)) == {
        "norm.weight",
        "norm.bias",
    }
    swin = trained(tiny_swin(), PartialConfig(blocks=1, final_norm=False))
    assert swin
    assert all(name.startswith("layers.1.blocks.1.") for name in swin)  # what Mona's code tests for
    merging = {name for name in trained(tiny_swin(), PartialConfig(blocks=3)) if "downsample" in name}
    assert merging == {"layers.1.downsample.norm.weight", "layers.1.downsample.norm.bias",
                       "layers.1.downsample.reduction.weight"}  # fmt: skip
    last = trained(tiny_convnext(), PartialConfig(blocks=1))
    assert {name.rpartition(".")[0] for name in last if not name.startswith("stages.3.")} == {"head.norm"}


def test_partial_trains_its_batch_norms_and_their_statistics():
    model = dl.attach(tiny_resnet(), PartialConfig(blocks=1))
    model.train()
    modes = {name: m.training for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if training} == {
        name for name in modes if name.startswith("layer4.0.")
    }


@pytest.mark.parametrize("blocks", [0, -1])
def test_partial_refuses_no_blocks(blocks):
    with pytest.raises(ValueError, match="at least 1"):
        PartialConfig(blocks=blocks)


def test_partial_refuses_more_blocks_than_there_are():
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"blocks=4, but VisionTransformer has 3 blocks.*FullConfig"):
        dl.attach(model, PartialConfig(blocks=4))
    assert not any("delta" in name for name, _ in model.named_modules())


def test_partial_in_a_named_backbone():
    """What lies around the backbone is a head, not what is behind the last block."""
    wrapped = nn.ModuleDict({"body": tiny_vit(num_classes=0), "decoder": nn.Sequential(nn.LayerNorm(24))})
    dl.attach(wrapped, PartialConfig(final_norm=False), backbone="body")
    found = {row.name: row.kind for row in dl.parameter_table(wrapped)}
    assert {name for name, kind in found.items() if kind == "head"} == {"decoder.0.weight", "decoder.0.bias"}
    assert all(name.startswith("body.blocks.2.") for name, kind in found.items() if kind == "unfrozen")


# ------------------------------------------------------------------ norms and biases
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin, tiny_convnext])
def test_norms_are_what_the_official_name_test_finds(build):
    model = build()
    by_name = {name for name, _ in model.named_parameters() if "norm" in name}
    found = trained(model, NormTuningConfig())
    if build is tiny_convnext:  # its patch embedding and downsampling are sequences, whose norms have numbers for names
        numbered = {"stem.1", *[f"stages.{stage}.downsample.0" for stage in (1, 2, 3)]}
        assert {name.rpartition(".")[0] for name in found - by_name} == numbered
        assert by_name < found
    else:
        assert found == by_name


def test_norms_by_class():
    class RMSNorm(nn.Module):  # as many libraries write their own
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class Normalizer(nn.Module):
        pass

    for norm in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.RMSNorm(4), RMSNorm()):
        assert is_norm(norm)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(4)), Normalizer()):
        assert not is_norm(other)


def test_norms_with_running_statistics_of_their_own():
    model, x = tiny_resnet(), images("resnet", batch=6)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    plain = model(x)
    dl.attach(model, NormTuningConfig())
    assert dl.count_parameters(model).adapter == 2 * sum(norm.num_features for norm in norms)
    model.train()(x)
    assert all(norm.training for norm in norms)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.eval()
    adapted = model(x)
    assert not torch.equal(adapted, plain)
    with dl.disable_adapter(model):
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), adapted)
    dl.detach(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_norms_of_networks_without_any_are_an_error():
    body = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    with pytest.raises((TypeError, ValueError)):
        dl.attach(body, NormTuningConfig(), blocks=r"\d")


@pytest.mark.parametrize("relative", [True, False])
def test_biases_and_tables(relative):
    """The official test is the substring "bias"; without the tables it is the ending."""
    networks = [
        tiny_vit(),
        tiny_vit(qkv_bias=False, class_token=False, global_pool="avg"),
        tiny_swin(),
        tiny_swin_v2(),
        Levit(embed_dim=(16, 16), key_dim=8, depth=(2, 2), num_heads=(2, 2), attn_ratio=2, num_classes=0),
    ]
    for model in networks:
        model.pretrained_cfg = {"input_size": (3, 224, 224) if isinstance(model, Levit) else (3, 32, 32)}
        by_name = {
            n for n, _ in model.named_parameters() if "bias" in n.rpartition(".")[2] and not n.startswith("head.")
        }
        endings = {name for name in by_name if name.endswith("bias")}
        assert trained(model, BitFitConfig(relative_position=relative)) == (by_name if relative else endings)
    tables = [n for n, _ in networks[2].named_parameters() if n.endswith("relative_position_bias_table")]
    assert len(tables) == 4
    assert any(name.endswith("attention_biases") for name, _ in networks[4].named_parameters())


# ------------------------------------------------------------------ lifecycle
UNFROZEN = {"norms": NormTuningConfig(), "partial": PartialConfig(), "partial, 2": PartialConfig(2, final_norm=False)}
each_pair = pytest.mark.parametrize(("family", "name"), [(family, name) for family in MODELS for name in UNFROZEN])


@each_pair
def test_train_save_load_and_detach(family, name, tmp_path):
    model, x = MODELS[family](), images(family, batch=4)
    before, state = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    dl.attach(model, UNFROZEN[name], num_classes=7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    _, gradients = backward(model.train(), x)
    assert all(gradient.abs().max() > 0 for key, gradient in gradients.items() if "relative_position" not in key)
    optimizer.step()
    y = model.eval()(x)
    assert not torch.allclose(y, dl.attach(MODELS[family](), dl.LinearConfig(), num_classes=7)(x))
    dl.save_pretrained(model, tmp_path)
    other = dl.attach(MODELS[family](), dl.LinearConfig(), name="first")
    dl.load_adapter(other, tmp_path, name="second")
    assert torch.equal(other.eval()(x), y)
    dl.set_adapter(other, "first")
    torch.testing.assert_close(other(x), before)
    dl.set_adapter(other, "second")
    assert torch.equal(other(x), y)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), y)
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [*UNFROZEN.values(), dl.MLPConfig(layers=2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_row_equals_all_rows(architecture, config):
    model, x = tiny_vit(**ARCHITECTURES[architecture]).double(), images("vit").double()
    randomize_adapter(dl.attach(model, config))
    assert rows_of_last_mlp(model, x) == 1
    found, grads = backward(model, x)
    expected, full_grads = backward(Full(model), x)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same({f"model.{name}": g for name, g in grads.items()}, full_grads, **EXACT)


@pytest.mark.parametrize("family", ["vit", *[pytest.param(f, marks=pytest.mark.slow) for f in MODELS if f != "vit"]])
def test_autocast_and_compile(family):
    torch.compiler.reset()
    model, x = MODELS[family](), images(family)
    dl.attach(model, [NormTuningConfig(), PartialConfig(blocks=1), dl.MLPConfig(layers=2)])
    randomize_adapter(model)
    expected, gradients = backward(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert (model(x).float() - expected).abs().max() < 0.1 * expected.abs().max()
    found, compiled = backward(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    compiled = {key.removeprefix("_orig_mod."): gradient for key, gradient in compiled.items()}
    assert_same(compiled, gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_with_prompts_and_lora(family):
    model, x = MODELS[family](), images(family)
    before = model(x)
    dl.attach(model, [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2), NormTuningConfig(), PartialConfig()])
    randomize_adapter(model)
    _, gradients = backward(model, x)
    kinds = {row.kind for row in dl.parameter_table(model)}
    assert kinds == {"inserted", "unfrozen", "head"}
    assert all(gradient.abs().max() > 0 for key, gradient in gradients.items() if "relative_position" not in key)
    dl.detach(model)
    assert torch.equal(model(x), before)
