"""Adapters of dense networks in files, and between a classifier and dense networks on one backbone."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from dense_models import BACKBONES, network, pictures
from models import randomize, randomize_adapter

import deltalens as dl

HEAD_OPTIONS = {"channels": 8, "pyramid_channels": 8}
METHODS = {
    "mona": dl.MonaConfig(bottleneck=4, dropout=0.0),
    "lora": dl.LoRAConfig(r=2),
    "normtuning": dl.NormTuningConfig(),
    "vpt": dl.VPTConfig(num_tokens=2),
    "full": dl.FullConfig(),
}


def classifier(kind):
    """A classifier around the backbone that `network(kind)` has."""
    name, sizes = BACKBONES[kind]
    made = {"always_partition": True} if kind == "swin" else {}
    model = dl.create_backbone(f"timm/{name}", pretrained=False, num_classes=5, **sizes, **made)
    randomize(model, seed=1)
    around = network(kind, "fcn")
    own = around.get_submodule(around.adapted).state_dict()
    names = dl.describe(around).canonical
    own = {names(f"{around.adapted}.{path}"): tensor for path, tensor in own.items()}
    model.load_state_dict(own, strict=False)
    return model.eval()


def saved_network(folder):
    """A network of a shipped backbone, saved, with its answer to some images."""
    options = {"head": "fcn", "head_options": HEAD_OPTIONS, "img_size": 96}
    model = dl.create_backbone("deltalens/vit-mini", num_classes=3, **options)
    dl.attach(model, METHODS["mona"])
    randomize_adapter(model)
    x = pictures(45, 67)
    torch.save({"x": x, "out": model.eval()(x)["out"].detach()}, folder / "expected.pt")
    dl.save_pretrained(model, folder / "adapter")
    return options


CHECK = """
import sys, torch, deltalens as dl
known = torch.load(f"{sys.argv[1]}/expected.pt", weights_only=True)
model = dl.from_pretrained(f"{sys.argv[1]}/adapter")
assert torch.equal(model(known["x"])["out"], known["out"])
assert dl.preprocessing(model)["input_size"] == [3, 96, 96]
assert not model.training
"""


def test_the_network_is_rebuilt(tmp_path, monkeypatch):
    options = saved_network(tmp_path)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model"]
    assert base["kwargs"] == options
    assert base["input_size"] == [3, 96, 96]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    exec(CHECK, {})


@pytest.mark.slow
def test_the_network_is_rebuilt_in_a_fresh_process(tmp_path):
    saved_network(tmp_path)
    subprocess.run([sys.executable, "-c", CHECK, str(tmp_path)], check=True, timeout=300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_dense_adapter_is_loaded_with_its_head(kind, method, tmp_path):
    model, x = dl.attach(network(kind, "fcn"), METHODS[method]), pictures()
    randomize_adapter(model)
    dl.save_pretrained(model, tmp_path)
    other = dl.load_adapter(network(kind, "fcn"), tmp_path)
    assert torch.equal(other.eval()(x)["out"], model.eval()(x)["out"])
    dl.load_adapter(other, tmp_path, name="second")  # beside the first
    assert torch.equal(other.eval()(x)["out"], model(x)["out"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_classifiers_adapter_in_a_dense_network_and_back(kind, method, tmp_path, caplog):
    plain, x = classifier(kind), pictures(224, 224, count=1)
    dl.attach(plain, METHODS[method], num_classes=7)
    randomize_adapter(plain)
    dl.adapter_info(plain)["class_names"] = list("abcdefg")
    dl.save_pretrained(plain.eval(), tmp_path / "classifier")
    model = network(kind, "fcn")
    head = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("maps.backbone")}
    caplog.set_level(logging.WARNING)
    dl.load_adapter(model, tmp_path / "classifier")
    assert "is passed over: it belongs to a classifier, and Segmenter keeps its own head" in caplog.text
    assert dl.class_names(model) is None
    assert model.num_classes == 3
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())
    expected = plain.forward_intermediates(x, indices=[-1], intermediates_only=True)[0]
    taken = model.eval().maps.backbone(x)[-1].permute(0, 3, 1, 2) if kind == "swin" else tokens(model, x)
    torch.testing.assert_close(taken, expected)

    caplog.clear()
    dl.save_pretrained(model, tmp_path / "dense")
    back = classifier(kind)
    own_head = back.get_classifier().weight.detach().clone()
    dl.load_adapter(back, tmp_path / "dense")
    assert "belongs to a network with head='fcn'" in caplog.text
    assert torch.equal(back.get_classifier().weight, own_head)
    found = back.eval().forward_intermediates(x, indices=[-1], intermediates_only=True)[0]
    torch.testing.assert_close(found, expected)


def tokens(model, x):
    return model.maps.backbone.forward_intermediates(x, indices=[-1], intermediates_only=True)[0]


def test_between_two_dense_heads(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model, x = dl.attach(network("vit", "fcn"), METHODS["mona"]), pictures()
    randomize_adapter(model)
    dl.save_pretrained(model, tmp_path)
    other = dl.load_adapter(network("vit", "setr_pup"), tmp_path)
    assert "a network with head='fcn'" in caplog.text
    torch.testing.assert_close(tokens(other.eval(), x), tokens(model.eval(), x))


def test_a_head_of_other_classes_is_an_error(tmp_path):
    dl.save_pretrained(dl.attach(network("swin", "fcn"), METHODS["mona"]), tmp_path)
    model = network("swin", "fcn", num_classes=4)
    with pytest.raises(ValueError, match=r"another shape: outside\.head\.classify\.1\.bias is \(3,\), expected \(4,"):
        dl.load_adapter(model, tmp_path)
    assert not hasattr(model, "delta")
    with pytest.raises(ValueError, match=r"num_classes=4 was given, but Segmenter has no classifier layer to replace"):
        dl.attach(model, METHODS["mona"], num_classes=4)


def test_another_backbone_is_refused(tmp_path):
    dl.save_pretrained(dl.attach(classifier("swin"), METHODS["mona"]), tmp_path)
    model = randomize(network("swin", "fcn"), seed=5)
    with pytest.raises(ValueError, match="trained on a backbone with other weights"):
        dl.load_adapter(model, tmp_path)


def test_tables_interpolated_for_another_image_size_are_no_other_backbone(tmp_path):
    """Windows of the shipped Swin are cut to its small maps: at 128 px its tables are larger ones."""
    plain = dl.attach(dl.create_backbone("deltalens/swin-mini", num_classes=3), METHODS["lora"])
    dl.save_pretrained(plain, tmp_path)
    options = {"head": "fcn", "head_options": {"channels": 8}, "img_size": 128}
    model = dl.create_backbone("deltalens/swin-mini", num_classes=3, **options)
    assert model.maps.backbone.layers_3.blocks[1].window_size == (4, 4)
    dl.load_adapter(model, tmp_path)
    assert dl.active_adapters(model) == ("default",)
