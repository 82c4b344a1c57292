"""peft's tuners: counts, modes, groups, devices, files."""

import dataclasses
import json
import types

import peft
import pytest
import torch
from models import CLASSES, randomize, randomize_adapter, tiny_vit
from peft_tuners import X, assert_unchanged, build, directly, everything_about, loha, method_of, wrapped_layers
from safetensors.torch import load_file, save_file
from torch import nn

import deltalens as dl
from deltalens.lifecycle.count import parameter_table
from deltalens.lifecycle.tensors import adapter_tensors
from deltalens.methods import method_class
from deltalens.training.optim import parameter_groups


# ------------------------------------------------------------------ counts, modes, groups, devices
def test_counts_and_table():
    model = dl.attach(build("swin"), dl.make_config("peft/vera", r=8))
    plain = dl.count_parameters(dl.attach(build("swin"), dl.LinearConfig()))
    count = dl.count_parameters(model)
    assert count.backbone == plain.backbone
    assert count.head == plain.head
    assert count.adapter == sum(8 + 3 * width for width in (12, 12, 24, 24))
    rows = parameter_table(model)
    assert sum(row.numel for row in rows if row.kind == "inserted") == count.adapter
    assert {row.name for row in rows if row.kind != "head"} >= {"layers.0.blocks.0.attn.qkv.vera_lambda_b.default"}


def test_a_vector_bank_shared_by_all_layers_counts_and_is_saved_once(tmp_path):
    model = dl.attach(build("vit"), method_of("vblora"))
    bank = 16 * 12
    logits = 3 * (4 * 24 // 12 + 4 * 72 // 12) * 16
    assert dl.count_parameters(model).adapter == bank + logits
    dl.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for key, t in tensors.items() if not key.startswith("head")) == bank + logits
    assert "vblora_vector_bank" in tensors


def test_shared_projections_are_saved_once(tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), method_of("randlora")), tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("randlora_A" in key for key in keys) == 1
    assert sum("randlora_lambda" in key for key in keys) == 3


def test_frozen_layers_are_in_eval_mode_and_wrappers_train():
    model = dl.attach(tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5), dl.make_config("peft/lora", lora_dropout=0.5))
    model.train()
    wrapper = model.blocks[0].attn.qkv
    assert wrapper.training
    assert wrapper.lora_dropout.default.training
    assert not wrapper.base_layer.training
    assert not model.blocks[0].attn.proj_drop.training
    randomize_adapter(model)
    assert not torch.equal(model(X["vit"]), model(X["vit"])), "peft's dropout is active"
    assert not any(module.training for module in model.eval().modules())


def test_parameter_groups():
    model = dl.attach(build("vit"), [dl.make_config("peft/lora", r=2, target_modules=("qkv",)), loha("fc1")])
    groups = {group["weight_decay"]: group["names"] for group in parameter_groups(model, 1e-3, 0.05)}
    assert "blocks.0.attn.qkv.lora_A.default.weight" in groups[0.05]
    assert "blocks.0.mlp.fc1.hada_w1_a.default" in groups[0.0]
    assert not any("base_layer" in name for names in groups.values() for name in names)


def test_inactive_wrappers_follow_the_model():
    model, x = build("vit"), X["vit"]
    randomize_adapter(dl.attach(model, loha("fc1"), "a"))
    expected = model(x)
    dl.attach(model, dl.MonaConfig(bottleneck=6), "b")
    model.double()
    dl.set_adapter(model, "a")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x.double()).float(), expected, atol=1e-5, rtol=1e-5)


def test_wrappers_of_a_bfloat16_model_stay_as_peft_makes_them():
    model, x = build("swin").bfloat16(), X["swin"].bfloat16()
    dl.attach(model, dl.make_config("peft/lora", r=2))
    adapted = randomize_adapter(model)(x)
    assert adapted.dtype == torch.bfloat16
    assert model.layers[0].blocks[0].attn.qkv.lora_A.default.weight.dtype == torch.float32
    with dl.disable_adapter(model):
        assert not torch.equal(model(x), adapted)
    assert torch.equal(model(x), adapted)
    assert model.layers[0].blocks[0].attn.qkv.lora_A.default.weight.dtype == torch.float32


def test_a_plain_checkpoint_meets_an_adapted_model():
    model = dl.attach(build("vit"), loha())
    with pytest.raises(RuntimeError, match="checkpoint of the plain backbone, and the model has adapters"):
        model.load_state_dict(build("vit").state_dict())


def test_adalora_s_regulariser_is_peft_s():
    class WithLoss(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return types.SimpleNamespace(loss=self.network(x).sum() * 0)

    method = dl.make_config("peft/adalora", init_r=4, total_step=10)
    config = method.peft_config()
    config.target_modules = {"qkv"}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(WithLoss(build("vit")), config)
    torch.manual_seed(0)
    ours = dl.attach(build("vit"), method)
    (loss,) = method.losses(ours, None, None).values()
    torch.testing.assert_close(loss, theirs.base_model(X["vit"]).loss)
    assert loss > 0
    loss.backward()
    assert loha().losses(ours, None, None) == {}


# ------------------------------------------------------------------ files
def test_the_folder(tmp_path):
    model = dl.attach(build("vit"), loha("qkv", "fc1"), "flowers")
    dl.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEFT/LOHA"
    (entry,) = config["methods"]
    assert (entry["method"], entry["r"], entry["target_modules"]) == ("peft/loha", 2, ["fc1", "qkv"])
    assert all("base_layer" not in name and "hada" not in name for name in config["base_model"]["fingerprint"])
    assert config["trained_parameters"]["adapter"] == dl.count_parameters(model).adapter > 0
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"blocks.0.attn.qkv.hada_w1_a", "blocks.2.mlp.fc1.hada_w2_b", "head.weight"} <= keys
    assert not any("flowers" in key or "default" in key for key in keys)
    assert keys == adapter_tensors(model).keys()


def test_tensors_are_peft_s_own(tmp_path):
    """The same tensors as in a folder that peft writes."""
    theirs, ours = directly("vit", "lokr", seed=5), build("vit")
    torch.manual_seed(5)
    dl.attach(ours, method_of("lokr"))
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    found = {f"base_model.model.{k}": t for k, t in adapter_tensors(ours).items() if not k.startswith("head")}
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in written)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_damaged_tensors_are_named_and_nothing_changes(damage, tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), loha()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "blocks.1.attn.qkv.hada_w1_a"
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["blocks.1.attn.qkv.hada_w3"] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(5, 5)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = build("vit")
    before = everything_about(model)
    with pytest.raises(ValueError, match=r"(missing|not expected|of another shape): blocks\.1\.attn\.qkv\.hada_w"):
        dl.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_another_backbone_is_refused(tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), loha()), tmp_path)
    with pytest.raises(ValueError, match="backbone with other weights"):
        dl.load_adapter(randomize(build("vit"), seed=9), tmp_path)


def test_adapters_travel_to_a_feature_extractor(tmp_path):
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (1, 1, 2), "num_heads": (2, 2, 4), "window_size": 4}
    classifier = timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **sizes)
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **sizes)
    features.load_state_dict(
        {key.replace("layers.", "layers_"): t for key, t in classifier.state_dict().items()}, strict=False
    )
    randomize_adapter(dl.attach(classifier, loha("qkv", "fc2")))
    dl.save_pretrained(classifier, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    dl.load_adapter(features, tmp_path)
    expected = classifier.eval().forward_intermediates(x, intermediates_only=True)
    found = [feature_map.permute(0, 3, 1, 2) for feature_map in features.eval()(x)]
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert adapter_tensors(features).keys() <= load_file(tmp_path / "adapter_model.safetensors").keys()


def test_a_named_backbone(tmp_path):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = build("vit"), nn.Sequential(nn.Linear(CLASSES, 4), nn.GELU(), nn.Linear(4, 2))

        def forward(self, x):
            return self.decoder(self.encoder(x))

    def make():
        torch.manual_seed(0)
        return Segmenter().eval()

    model, x = make(), X["vit"]
    plain = model(x)
    randomize_adapter(dl.attach(model, loha("qkv"), backbone="encoder"))
    adapted = model(x)
    assert wrapped_layers(model) == [f"encoder.blocks.{i}.attn.qkv" for i in range(3)]
    dl.save_pretrained(model, tmp_path)
    assert "blocks.0.attn.qkv.hada_w1_a" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(dl.from_pretrained(tmp_path, make())(x), adapted)
    assert torch.equal(dl.detach(model)(x), plain)


def test_classes_are_made_once():
    assert method_class("peft/loha") is type(loha())
    assert dataclasses.is_dataclass(method_class("peft/loha"))
    assert method_class("peft/loha").__doc__.startswith("LoHa of the peft library")
