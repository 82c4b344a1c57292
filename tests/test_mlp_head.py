"""MLP-k heads: formula, files, switching with linear heads, class counts, and other methods beside them."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, MODELS, backward, images, randomize_adapter, tiny_resnet, tiny_swin, tiny_vit
from safetensors.torch import load_file, save_file
from torch import nn

import deltalens as dl
from deltalens.methods.mlp import MLPHead


def plain(head: MLPHead, features: torch.Tensor) -> torch.Tensor:
    """The formula in eval mode, from the tensors alone."""
    state, x = head.state_dict(), features
    for i in range(0, len(head.projection), 4):
        x = F.linear(x, state[f"projection.{i}.weight"], state[f"projection.{i}.bias"]).clamp(min=0)
        norm = {leaf: state[f"projection.{i + 2}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")}
        x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return F.linear(x, state["last_layer.weight"], state["last_layer.bias"])


@pytest.mark.parametrize("layers", [2, 3, 5, 9])
def test_formula(layers):
    head = MLPHead(12, 5, layers, 0.1).double()
    assert sum(p.numel() for p in head.parameters()) == (layers - 1) * (12 * 12 + 3 * 12) + 13 * 5
    assert [m.p for m in head.projection if isinstance(m, nn.Dropout)] == [0.1] * (layers - 1)
    for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(head.eval()(x), plain(head, x), rtol=1e-12, atol=1e-12)
    maps = torch.randn(2, 3, 4, 12, dtype=torch.float64)  # features of a model without pooling
    torch.testing.assert_close(head(maps)[1, 2], head(maps[1, 2]), rtol=1e-12, atol=1e-12)


def test_start():
    head = MLPHead(400, 100, 2, 0.0)
    assert head.last_layer.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.05)
    assert head.projection[0].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)
    assert not head.last_layer.bias.any()


@pytest.mark.parametrize("family", MODELS)
def test_on_every_family(family):
    model, x = MODELS[family](), images(family, batch=4)
    before = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dl.attach(model, dl.MLPConfig(layers=3), num_classes=7)
    assert dl.count_parameters(model).adapter == 0
    randomize_adapter(model)
    model.train()
    y, gradients = backward(model, x)
    assert y.shape == (4, 7)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    norms = [m for m in model.get_classifier().modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert all(norm.training and norm.running_mean.any() for norm in norms)
    model.eval()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    head = model.get_classifier()
    torch.testing.assert_close(model(x), plain(head, features.flatten(1)), rtol=1e-5, atol=1e-5)
    assert dl.describe(model).head is not None
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.num_classes == CLASSES


def test_switching_between_head_kinds():
    model, x = tiny_vit(), images("vit")
    plain_logits = model(x)
    dl.attach(model, dl.MLPConfig(layers=2), name="mlp", num_classes=4)
    mlp = randomize_adapter(model)(x)
    dl.attach(model, dl.LoRAConfig(r=2), name="linear", num_classes=3)
    assert isinstance(model.head, nn.Linear)  # made from the model's own head, not from the other adapter's
    linear = randomize_adapter(model)(x)
    dl.attach(model, [dl.VPTConfig(num_tokens=2), dl.MLPConfig(layers=3)], name="both")
    both = randomize_adapter(model)(x)
    for name, expected, classes in (("mlp", mlp, 4), ("linear", linear, 3), ("both", both, CLASSES)):
        dl.set_adapter(model, name)
        assert torch.equal(model(x), expected)
        assert expected.shape == (2, classes)
        assert model.num_classes == classes
        assert dl.describe(model).head == "head"
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("head")}
        assert trainable == {n for n, _ in model.named_parameters() if n.startswith("head")}
    dl.set_adapter(model, ["linear", "mlp"])  # modules of both, the head of the last
    assert model(x).shape == (2, 4)
    assert not torch.equal(model(x), mlp)
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), plain_logits)
    twin = copy.deepcopy(model)
    dl.set_adapter(twin, "both")
    assert torch.equal(twin(x), both)
    dl.delete_adapter(model, "mlp")
    dl.set_adapter(model, "linear")
    assert torch.equal(model(x), linear)
    dl.detach(model)
    assert torch.equal(model(x), plain_logits)


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin, tiny_resnet])
def test_files(build, tmp_path):
    family = build.__name__.removeprefix("tiny_")
    model, x = build(), images(family, batch=4)
    dl.attach(model, [dl.MLPConfig(layers=3), dl.BitFitConfig()], num_classes=6)
    randomize_adapter(model)
    model.train()(x)  # running statistics of the head
    model.eval()
    dl.save_pretrained(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    head = dl.describe(model).head
    assert saved[f"{head}.projection.2.running_mean"].any()
    assert saved[f"{head}.projection.6.num_batches_tracked"] == 1
    again = dl.from_pretrained(tmp_path / "a", model=build())
    assert torch.equal(again(x), model(x))
    other = build()
    dl.attach(other, dl.LinearConfig(), name="first")
    dl.load_adapter(other, tmp_path / "a", name="second")
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.slow
def test_files_in_a_fresh_process(tmp_path):
    model = dl.create_backbone("deltalens/vit-mini", num_classes=200)
    dl.attach(model, [dl.VPTConfig(num_tokens=2), dl.MLPConfig(layers=2)], num_classes=4)
    randomize_adapter(model).eval()
    dl.save_pretrained(model, tmp_path / "a")
    x = torch.randn(2, 3, 48, 48)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, torch, deltalens as dl\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "model = dl.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): save_file({'y': model(load_file(sys.argv[2])['x'])}, sys.argv[3])\n"
    )
    files = [tmp_path / name for name in ("a", "x.safetensors", "y.safetensors")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    with torch.no_grad():
        assert torch.equal(load_file(files[2])["y"], model(x))


def test_a_file_with_another_head_is_refused(tmp_path):
    dl.save_pretrained(dl.attach(tiny_vit(), dl.MLPConfig(layers=3)), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"layers": 3', '"layers": 2'))
    model, x = tiny_vit(), images("vit")
    before = model(x)
    with pytest.raises(ValueError, match=r"not expected: head\.projection\.4"):
        dl.load_adapter(model, tmp_path / "a")
    assert torch.equal(model(x), before)


def test_merging_keeps_the_head():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, [dl.LoRAConfig(r=2), dl.MLPConfig(layers=2)])
    expected = randomize_adapter(model)(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.head, MLPHead)


def test_half_precision_models():
    model = tiny_vit().bfloat16()
    dl.attach(model, dl.MLPConfig(layers=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images("vit").bfloat16()).isfinite().all()


@pytest.mark.parametrize(("settings", "message"), [({"layers": 1}, "LinearConfig"), ({"dropout": 1.0}, r"\[0, 1\)")])
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dl.MLPConfig(**settings)


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="has no head"):
        dl.attach(tiny_vit(num_classes=0), dl.MLPConfig())
