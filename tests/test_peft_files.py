"""LoRA files travel between deltalens and peft, both ways, tested with peft itself."""

import json
import warnings

import pytest
import torch
from test_files import stir, tiny_vit
from test_merge import tiny_swin

import deltalens as dl

peft = pytest.importorskip("peft")


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("parts", [("q", "v"), ("k",), ("q", "k", "v", "proj", "fc1", "fc2")], ids="-".join)
def test_ours_loads_in_peft(build, parts, tmp_path):
    model = stir(dl.attach(build(), dl.LoRAConfig(r=3, alpha=5.0, parts=parts))).eval()
    dl.save_pretrained(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(images()), model(images()), rtol=1e-4, atol=1e-5)
    again = dl.from_pretrained(tmp_path, model=build())
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["qkv", "proj"], "exclude_modules": ["patch_embed.proj"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["fc1"], "r": 2, "use_rslora": True},
        {"target_modules": r".*\.(qkv|fc2)", "r": 4, "rank_pattern": {"fc2": 2}, "alpha_pattern": {"fc2": 7}},
    ],
    ids=["fused qkv", "rslora", "patterns"],
)
def test_theirs_loads_here(settings, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, modules_to_save=["head"], **settings)
    theirs = peft.get_peft_model(tiny_vit(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = dl.from_pretrained(tmp_path, model=tiny_vit())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_other_peft_methods_are_refused_by_name(tmp_path):
    theirs = peft.get_peft_model(tiny_vit(), peft.LoHaConfig(target_modules=["fc1"], r=2))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="LOHA"):
        dl.load_adapter(tiny_vit(), tmp_path)
    dora = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["fc1"], r=2, use_dora=True))
    dora.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="use_dora"):
        dl.load_adapter(tiny_vit(), tmp_path)


def test_config_is_peft_compatible(tmp_path):
    dl.save_pretrained(dl.attach(tiny_vit(), dl.LoRAConfig()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] == ["head"]
    assert config["methods"] == [{**dl.LoRAConfig().to_dict(), "parts": ["q", "v"]}]


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (("proj",), "patch embedding"),
        (("head",), "belongs to the head"),
        (("norm1",), "nn.Linear"),
        (("nothing",), "matches no"),
    ],
    ids=str,
)
def test_unfit_targets_are_refused(targets, reason):
    with pytest.raises(ValueError, match=reason):
        dl.attach(tiny_vit(), dl.LoRAConfig(target_modules=targets))


def test_bypassed_layers_are_refused():
    """nn.MultiheadAttention reads out_proj's weight without calling the layer."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    from deltalens.sites.anatomy import Anatomy
    from deltalens.sites.weights import refuse_unfit_target

    layer = encoder.layers[0].self_attn.out_proj
    with pytest.raises(ValueError, match="never called"):
        refuse_unfit_target(Anatomy(encoder, []), "layers.0.self_attn.out_proj", layer)
