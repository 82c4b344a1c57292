"""Sidetune, and the slot it sits in: what a classifier's layer reads."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_SIZE, MODELS, backward, images, randomize, randomize_adapter, tiny_swin, tiny_vit
from safetensors.torch import load_file, save_file
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

import deltalens as dl
from deltalens.methods import Method, register
from deltalens.methods.sidetune import SideNetwork, SidetuneConfig

RANDOM = SidetuneConfig(pretrained=False)


class Recorder(nn.Module):
    """Passes features on unchanged and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, features, images):
        self.seen.append((features.detach(), images))
        return features


@pytest.fixture
def recording(monkeypatch):
    from deltalens.methods import base

    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    recorder = Recorder()

    @register("test_recorder")
    class RecorderConfig(Method):
        def place(self, anatomy):
            yield anatomy.towers[0].classifier, "output", recorder

    return recorder, RecorderConfig()


CLASSIFIERS = {
    **{family: (build, images(family)) for family, build in MODELS.items()},
    "vit, mean pooling and fc_norm": (lambda: tiny_vit(global_pool="avg", fc_norm=True), images("vit")),
    "vit, attention pooling": (lambda: tiny_vit(global_pool="map", class_token=False), images("vit")),
    "swin, dropout before the head": (lambda: tiny_swin(drop_rate=0.2), images("swin")),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_slot_changes_nothing_by_itself(name, recording):
    build, x = CLASSIFIERS[name]
    recorder, config = recording
    model = build()
    expected = model(x)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    dl.attach(model, config)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    ((seen, seen_images),) = recorder.seen
    torch.testing.assert_close(seen, features, atol=1e-5, rtol=1e-5)
    assert seen_images is x
    torch.testing.assert_close(model.get_classifier()(seen), expected, atol=1e-5, rtol=1e-5)
    model(x, **({"attn_mask": None} if name == "vit" else {}))
    model.forward_features(x)  # not part of the classifier's end
    assert len(recorder.seen) == 2
    with dl.disable_adapter(model):
        model(x)
    assert len(recorder.seen) == 2
    dl.detach(model)
    assert torch.equal(model(x), expected)


def test_the_slot_with_prompts_and_the_class_row(recording):
    """VPT on Swin, whose owner pools prompts and map, and on a ViT whose last block computes one row."""
    recorder, config = recording
    for family, build in (("vit", tiny_vit), ("swin", tiny_swin)):
        x = images(family)
        torch.manual_seed(0)
        alone = randomize_adapter(dl.attach(build(), dl.VPTConfig(num_tokens=2)))
        torch.manual_seed(0)
        both = randomize_adapter(dl.attach(build(), [dl.VPTConfig(num_tokens=2), config]))
        recorder.seen.clear()
        torch.testing.assert_close(both(x), alone(x), atol=1e-6, rtol=1e-5)
        assert len(recorder.seen) == 1


def test_feature_width_where_layers_lie_between_blocks_and_head():
    """EfficientNet's head reads more channels than its last block has."""
    model = EfficientNet(decode_arch_def([["ir_r2_k3_s2_e2_c8"], ["ir_r2_k3_s2_e2_c12"]]), stem_size=8, num_features=40,
                         num_classes=5)  # fmt: skip
    randomize(model).eval()
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    assert dl.describe(model).towers[0].classifier.width == 40
    dl.attach(model, RANDOM)
    assert model(images("resnet")).shape == (2, 5)


# ------------------------------------------------------------------ the side network
@pytest.mark.parametrize("size", [(63, 63), (64, 90), (224, 224), (32, 32), (48, 30)])
def test_formula(size):
    side = SideNetwork(10, pretrained=False)
    nn.init.constant_(side.alpha, 0.7)
    features, x = torch.randn(2, 10), torch.randn(2, 3, *size)
    seen = x
    if min(size) < 63:
        scale = 63 / min(size)
        seen = F.interpolate(x, [-(-63 * s // min(size)) for s in size], mode="bilinear")
        assert min(seen.shape[-2:]) == 63
        assert max(seen.shape[-2:]) == pytest.approx(max(size) * scale, abs=1)
    state = side.state_dict()
    y = seen
    for index, settings in ((0, (4, 2)), (3, (1, 2)), (6, (1, 1)), (8, (1, 1)), (10, (1, 1))):
        stride, padding = settings
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        y = F.conv2d(y, weight, bias, stride, padding).clamp(min=0)
        if index in (0, 3, 10):
            y = F.max_pool2d(y, 3, 2)
    y = F.adaptive_avg_pool2d(y, 6).flatten(1) @ state["projection.weight"].t()
    share = 1 / (1 + torch.exp(torch.tensor(-0.7)))
    torch.testing.assert_close(side(features, x), share * features + (1 - share) * y, atol=1e-5, rtol=1e-4)


def test_start_is_half_and_half():
    side = SideNetwork(10)
    features, x = torch.randn(2, 10), torch.randn(2, 3, 64, 64)
    branch = side.projection(side.pool(side.features(x)).flatten(1))
    torch.testing.assert_close(side(features, x), (features + branch) / 2)


@pytest.mark.parametrize("family", MODELS)
def test_on_every_family(family):
    model, x = MODELS[family](), images(family)
    before, state = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dl.attach(model, RANDOM, num_classes=3)
    randomize_adapter(model)
    logits, gradients = backward(model, x)
    assert logits.shape == (2, 3)
    assert len([n for n in gradients if n.startswith("delta.output.")]) == 12
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_backbone_features_are_frozen_and_in_eval_mode():
    model = tiny_vit(proj_drop_rate=0.5)
    dl.attach(model, RANDOM).train()
    assert not model.blocks[0].mlp.drop1.training
    assert model.delta.output.adapter_default.sidetune.training
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"delta", "head"}


def test_switching_and_combining():
    model, x = tiny_vit(), images("vit")
    plain = model(x)
    dl.attach(model, RANDOM, name="side")
    side = randomize_adapter(model)(x)
    dl.attach(model, [dl.LoRAConfig(r=2), RANDOM, dl.MLPConfig(layers=2)], name="all")
    all_of_it = randomize_adapter(model)(x)
    dl.set_adapter(model, "side")
    assert torch.equal(model(x), side)
    dl.set_adapter(model, "all")
    assert torch.equal(model(x), all_of_it)
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("family", MODELS)
def test_merged(family):
    model, x = MODELS[family](), images(family)
    dl.attach(model, [RANDOM, dl.BitFitConfig()])
    expected = randomize_adapter(model)(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_in_a_named_backbone(tmp_path):
    """The features that leave the submodule are mixed, wherever it sits."""

    def build():
        return nn.Sequential(tiny_vit(num_classes=0), nn.Linear(24, 3, bias=False))

    model, x = build(), images("vit")
    dl.attach(model, RANDOM, backbone="0")
    randomize_adapter(model)
    side = model[0].delta.output.adapter_default.sidetune
    with dl.disable_adapter(model):
        features = model[0](x)
    torch.testing.assert_close(model(x), model[1](side(features, x)))
    dl.save_pretrained(model, tmp_path)
    again = build()
    again.load_state_dict(build().state_dict())
    nn.init.ones_(again[1].weight)
    assert torch.equal(dl.from_pretrained(tmp_path, model=again)(x), model(x))


# ------------------------------------------------------------------ files
def weights_with(bias: float):
    """Stands in for torchvision's download: AlexNet's state dict with one recognisable tensor."""
    from torchvision.models import alexnet

    state = alexnet(weights=None).state_dict()
    state["features.0.bias"] = torch.full_like(state["features.0.bias"], bias)
    return state


def test_pretrained_weights_are_fetched_once_and_not_for_loading(monkeypatch, tmp_path):
    from torchvision.models import AlexNet_Weights

    calls = []

    def fetch(self, *args, **kwargs):
        calls.append(self)
        return weights_with(0.25)

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", fetch)
    model, x = tiny_vit(), images("vit")
    assert SidetuneConfig().pretrained
    dl.attach(model, SidetuneConfig())
    assert len(calls) == 1
    assert torch.equal(model.delta.output.adapter_default.sidetune.features[0].bias, torch.full((64,), 0.25))
    randomize_adapter(model)
    dl.save_pretrained(model, tmp_path / "a")
    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", lambda *args, **kwargs: pytest.fail("fetched again"))
    again = dl.from_pretrained(tmp_path / "a", model=tiny_vit())
    assert torch.equal(again(x), model(x))
    with pytest.raises(pytest.fail.Exception):  # outside of loading it is asked for as before
        dl.attach(tiny_vit(), SidetuneConfig())


def test_no_network_is_explained(monkeypatch):
    from urllib.error import URLError

    from torchvision.models import AlexNet_Weights

    def fetch(self, *args, **kwargs):
        raise URLError("unreachable")

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", fetch)
    model, x = tiny_vit(), images("vit")
    before = model(x)
    with pytest.raises(ConnectionError, match="pretrained=False"):
        dl.attach(model, SidetuneConfig())
    assert torch.equal(model(x), before)
    assert not any("delta" in name for name, _ in model.named_modules())


@pytest.mark.slow
def test_fresh_process(tmp_path):
    model = dl.create_backbone("deltalens/swin-mini", num_classes=4)
    dl.attach(model, RANDOM)
    randomize_adapter(model).eval()
    dl.save_pretrained(model, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    content = json.loads(config.read_text())
    content["methods"][0]["pretrained"] = True
    config.write_text(json.dumps(content))
    x = torch.randn(2, 3, 64, 64)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, socket, torch, deltalens as dl\n"
        "from safetensors.torch import load_file, save_file\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "torch.set_num_threads(1)\n"
        "model = dl.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): save_file({'y': model(load_file(sys.argv[2])['x'])}, sys.argv[3])\n"
    )
    files = [tmp_path / name for name in ("a", "x.safetensors", "y.safetensors")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    with torch.no_grad():
        assert torch.equal(load_file(files[2])["y"], model(x))


# ------------------------------------------------------------------ errors, precision, compilation
def test_models_without_a_classifier_are_named():
    import timm

    network = timm.create_model("resnet18", features_only=True)
    with pytest.raises(TypeError, match=r"Sidetune needs the features .* FeatureListNet"):
        dl.attach(network, RANDOM)
    from timm.models.deit import VisionTransformerDistilled

    two_heads = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    with pytest.raises(TypeError, match="Sidetune needs"):
        dl.attach(two_heads, RANDOM)


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match="at least 63"):
        SidetuneConfig(min_size=62)


@pytest.mark.parametrize(
    "family", ["vit", *[pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "resnet")]]
)
def test_autocast_compile_and_export(family):
    torch.compiler.reset()
    model, x = MODELS[family](), torch.randn(2, 3, *(IMAGE_SIZE[family],) * 2)
    dl.attach(model, RANDOM)
    randomize_adapter(model)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, atol=0.2 * float(expected.abs().max()), rtol=0.1)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
        exported = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-4, rtol=1e-4)
