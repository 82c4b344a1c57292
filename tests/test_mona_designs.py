"""Mona's earlier designs against their formulas, and the ablations of its paper as data."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from models import MODELS, images, randomize_adapter

import deltalens as dl
from deltalens.cli.recipes import recipe_files
from deltalens.methods.mona_designs import EARLIER_DESIGNS
from deltalens.studies.study_reader import read_study

DESIGNS = pytest.mark.parametrize("design", EARLIER_DESIGNS)
SWIN_T = [(96, 2), (192, 2), (384, 6), (768, 2)]  # width, blocks


def layer(design, dim=12, bottleneck=6, seed=0, **options):
    """A layer in float64 without dropout whose every parameter matters."""
    torch.manual_seed(seed)
    module = EARLIER_DESIGNS[design](dim, bottleneck, dropout=0.0, **options).double()
    for name, parameter in module.named_parameters():
        start = 1.0 if name.startswith(("gammax", "norm")) and not name.endswith("bias") else 0.0
        scale = 0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = start + scale * torch.randn_like(parameter)
    return module


def by_hand(design, t, x):
    """The figure, step by step, from a state dict: channels first, no module of ours."""

    def scaled_norm(d, i):
        channels_last = d.permute(0, 2, 3, 1)
        normed = F.layer_norm(channels_last, channels_last.shape[-1:], t[f"norm{i}.weight"], t[f"norm{i}.bias"])
        return (normed * t[f"gamma{i}"] + channels_last * t[f"gammax{i}"]).permute(0, 3, 1, 2)

    def depthwise(d):
        outputs = [
            F.conv2d(
                d, t[f"adapter_conv.conv{i}.weight"], t[f"adapter_conv.conv{i}.bias"], padding=i, groups=d.shape[1]
            )
            for i in (1, 2, 3)
        ]
        return torch.stack(outputs).mean(0) if design == "v3" else torch.stack(outputs).sum(0)

    def pointwise(d):
        return F.conv2d(d, t["adapter_conv.projector.weight"], t["adapter_conv.projector.bias"])

    d = F.linear(x, t["project1.weight"], t["project1.bias"]).permute(0, 3, 1, 2)
    if design == "v1":
        b = pointwise(depthwise(d)) + d
    else:
        a = depthwise(scaled_norm(d, 1)) + d
        b = pointwise(scaled_norm(a, 2)) + a
    return x + F.linear(F.gelu(b.permute(0, 2, 3, 1)), t["project2.weight"], t["project2.bias"])


def run(module, forward, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@DESIGNS
def test_forward_and_gradients_follow_the_figure(design):
    module, x = layer(design), torch.randn(2, 5, 9, 12, dtype=torch.float64) + 1
    found, grads = run(module, module, x)
    plain, plain_grads = run(module, module.plain, x)
    expected, expected_grads = run(module, lambda x: by_hand(design, dict(module.named_parameters()), x), x)
    for output, gradients in ((found, grads), (plain, plain_grads)):
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
        assert gradients.keys() == expected_grads.keys()
        for name in gradients:
            torch.testing.assert_close(gradients[name], expected_grads[name], atol=1e-10, rtol=1e-10, msg=name)


def test_the_designs_differ():
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    state = layer("v2").state_dict()
    outputs = {}
    for design in EARLIER_DESIGNS:
        module = layer(design)
        module.load_state_dict(state, strict=design != "v1")
        outputs[design] = module(x)
    for one, other in (("v1", "v2"), ("v2", "v3"), ("v1", "v3")):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


@DESIGNS
@pytest.mark.parametrize(("dim", "n"), [(96, 64), (40, 8)])
def test_parameters_of_one_layer(design, dim, n):
    inside = 88 * n if design == "v1" else 96 * n
    module = EARLIER_DESIGNS[design](dim, n)
    assert sum(p.numel() for p in module.parameters()) == (2 * n + 1) * dim + n**2 + inside


@DESIGNS
def test_parameters_on_swin_t(design):
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    dl.attach(model, dl.MonaConfig(design=design))
    inside = 88 if design == "v1" else 96
    assert dl.count_parameters(model).adapter == sum(
        2 * blocks * ((2 * 64 + 1) * width + 64**2 + inside * 64) for width, blocks in SWIN_T
    )


@DESIGNS
def test_initialisation(design):
    torch.manual_seed(0)
    module, x = EARLIER_DESIGNS[design](96, 64).eval(), torch.randn(1, 7, 7, 96)
    assert module.project1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module.project1.bias.abs().max() == module.project2.bias.abs().max() == 0
    if design != "v1":
        assert torch.equal(module.gamma1, torch.full((64,), 1e-6))
        assert torch.equal(module.gammax2, torch.ones(64))
    assert 0 < (module(x) - x).abs().max() < 1
    assert torch.equal(EARLIER_DESIGNS[design](96, 64, init="identity")(x), x)
    assert not torch.equal(module.train()(x), module(x)), "dropout is active in training"


@DESIGNS
@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_lifecycle(family, design, tmp_path):
    model, x = MODELS[family](), images(family)
    plain = model(x)
    dl.attach(model, dl.MonaConfig(bottleneck=6, design=design, dropout=0.0))
    randomize_adapter(model)
    adapted = model(x)
    assert (adapted - plain).abs().max() > 1e-3
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, MODELS[family]())
    assert torch.equal(again(x), adapted)
    torch.testing.assert_close(dl.merge_and_unload(again)(x), adapted)
    assert torch.equal(dl.detach(model)(x), plain)


@pytest.mark.parametrize(
    "settings", [{"reduce": "sum"}, {"norm": None}, {"norm_position": "bottleneck"}, {"memory": "low"}]
)
def test_settings_that_a_design_fixes_are_refused(settings):
    dl.MonaConfig(**settings)
    with pytest.raises(ValueError, match=f"design='v2' fixes {next(iter(settings))}"):
        dl.MonaConfig(design="v2", **settings)


def test_unknown_design():
    with pytest.raises(ValueError, match="design must be one of"):
        dl.MonaConfig(design="v4")


# ------------------------------------------------------------------ the ablations as data
def test_the_defaults_of_mona_are_what_they_were():
    assert dataclasses.asdict(dl.MonaConfig()) == {
        "bottleneck": 64,
        "kernels": (3, 5, 7),
        "reduce": "mean",
        "norm": "layer",
        "norm_position": "input",
        "dropout": 0.1,
        "init": "official",
        "memory": "normal",
        "design": "final",
    }


def published_ablations() -> dict[str, dl.MonaConfig]:
    variants = read_study(recipe_files("compare")["mona-ablations"], {"d": "."}).variants
    return {each.label: each.methods[0] for each in variants if each.methods[0].name == "mona"}


def test_the_recipe_has_the_papers_ablations_one_thing_varied_at_a_time():
    configs = published_ablations().values()
    assert {c.design for c in configs} == {"v1", "v2", "v3", "final"}
    assert {c.kernels for c in configs} == {(3,), (5,), (7,), (3, 3, 3), (3, 5, 7)}
    assert {c.bottleneck for c in configs} == {32, 64, 128}
    norms = {(None, "input"), ("batch", "input"), ("layer", "bottleneck"), ("layer", "input")}
    assert {(c.norm, c.norm_position) for c in configs} == norms
    for label, config in published_ablations().items():
        varied = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        assert len(varied) <= 1, label
    backbones = read_study(recipe_files("compare")["mona-ablations"], {"d": "."}).backbones
    known = {f"timm/{name}" for name in timm.list_pretrained("swin_*")}
    assert [b.label for b in backbones] == ["Swin-T", "Swin-B", "Swin-L"]
    assert {b.model for b in backbones} <= known


def test_every_variant_runs():
    x = images("swin")
    for label, config in published_ablations().items():
        model = dl.attach(MODELS["swin"](), dataclasses.replace(config, bottleneck=config.bottleneck // 8))
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), label
