"""Adapters on disk: round trips, damage, other backbones, interrupted saving."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import deltalens as dl
from deltalens.lifecycle import files
from deltalens.lifecycle.tensors import adapter_tensors

CONFIGS = {
    "mona": dl.MonaConfig(bottleneck=8),
    "vpt": dl.VPTConfig(num_tokens=3),
    "vpt-shallow": dl.VPTConfig(num_tokens=3, deep=False),
    "lora": dl.LoRAConfig(r=2, parts=("q", "v", "proj", "fc1")),
    "bitfit": dl.BitFitConfig(),
    "linear": dl.LinearConfig(),
    "full": dl.FullConfig(),
    "mona+bitfit": [dl.MonaConfig(bottleneck=8), dl.BitFitConfig()],
}


def tiny_vit(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**sizes, **options}).eval()


def stir(model, seed=1):
    """Move every trainable tensor away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(config, **options):
    return stir(dl.attach(tiny_vit(), config, **options)).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config, tmp_path):
    model, x = adapted(config), torch.randn(2, 3, 32, 32)
    info = dl.adapter_info(model)
    info["class_names"], info["metrics"] = ["cat", "dog", "eel"], {"top1": 0.5}
    dl.save_pretrained(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    again = dl.from_pretrained(tmp_path / "a", model=tiny_vit())
    assert torch.equal(again(x), model(x))
    assert dl.class_names(again) == ["cat", "dog", "eel"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "cat, dog, eel" in card
    assert f"{dl.count_parameters(model).adapter:,}" in card
    assert "{" not in card.split("```json")[0]


def test_head_with_other_class_count_and_second_adapter(tmp_path):
    model = adapted(dl.MonaConfig(bottleneck=8), num_classes=7)
    assert model.num_classes == 7
    dl.save_pretrained(model, tmp_path)
    other = adapted(dl.VPTConfig(num_tokens=2))
    dl.load_adapter(other, tmp_path, name="seven")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x), model(x))
    dl.set_adapter(other, "default")
    assert other(x).shape == (1, 3)


@pytest.mark.parametrize(
    "config", [c for n, c in CONFIGS.items() if n != "linear"], ids=[n for n in CONFIGS if n != "linear"]
)
def test_classifier_adapter_loads_into_feature_extractor(config, tmp_path):
    model = dl.create_backbone("deltalens/vit-mini", num_classes=3)
    stir(dl.attach(model, config)).eval()
    dl.save_pretrained(model, tmp_path)
    extractor = dl.create_backbone("deltalens/vit-mini", features_only=True)
    dl.load_adapter(extractor, tmp_path).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        for ours, theirs in zip(
            extractor(x)[-2:], model.forward_intermediates(x, 2, intermediates_only=True), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ bad files
@pytest.fixture
def saved(tmp_path):
    model = adapted(dl.MonaConfig(bottleneck=8))
    dl.save_pretrained(model, tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, error, match, model=None):
    """The folder is refused, and the model is as before: no adapters, same output."""
    model = model or tiny_vit()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    with pytest.raises(error, match=match):
        dl.load_adapter(model, folder)
    assert torch.equal(model(x), before)
    assert type(model) is VisionTransformer
    assert not any("delta" in name for name, _ in model.named_modules())


def test_missing_file(saved):
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, FileNotFoundError, r"adapter_model\.safetensors is missing")
    refused(saved / "nowhere", FileNotFoundError, "no such folder")


def test_truncated_tensors(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(saved, ValueError, "damaged")


def test_damaged_config(saved):
    (saved / "adapter_config.json").write_text('{"methods": [')
    refused(saved, ValueError, "damaged")


def test_newer_format(saved):
    edit(saved, deltalens_format=99)
    refused(saved, ValueError, "newer deltalens")


def test_other_weights(saved):
    refused(saved, ValueError, "other weights", tiny_vit(seed=5))


def test_other_architecture(saved):
    refused(saved, ValueError, "do not fit|other weights", tiny_vit(embed_dim=48))


def test_missing_and_extra_tensors(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("blocks.0.attention_stream.mona.gamma")
    tensors["blocks.0.attention_stream.mona.delta"] = gone
    save_file(tensors, path)
    refused(saved, ValueError, r"missing: blocks\.0\.attention_stream\.mona\.gamma.*not expected: .*mona\.delta")


def test_unknown_method(saved):
    edit(saved, methods=[{"method": "monna"}])
    refused(saved, ValueError, "unknown method 'monna'; did you mean mona")


def test_pickle_is_never_read(saved):
    torch.save({"a": 1}, saved / "adapter_model.safetensors")
    refused(saved, ValueError, "damaged")


@pytest.mark.parametrize("writer", ["save", "model_card"])
def test_interrupted_saving_keeps_the_old_adapter(saved, writer, monkeypatch):
    """A full disk or a kill while writing: the old files stay whole and no temporary file remains."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = stir(adapted(dl.MonaConfig(bottleneck=8)), seed=3)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, writer, no_space)
    with pytest.raises(OSError, match="No space left"):
        dl.save_pretrained(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_killed_between_two_renames_leaves_no_mixture(saved, monkeypatch):
    """New tensors beside an old configuration would be another adapter; without a configuration there is none."""
    replace = os.replace

    def replace_or_stop(source, target):
        if target.name == "adapter_config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        dl.save_pretrained(stir(adapted(dl.MonaConfig(bottleneck=4)), seed=3), saved)
    refused(saved, FileNotFoundError, "adapter_config.json is missing")


def test_plain_checkpoint_after_attach_gets_a_hint():
    model = adapted(dl.MonaConfig(bottleneck=8))
    with pytest.raises(RuntimeError, match="load it before attach"):
        model.load_state_dict(tiny_vit().state_dict())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bottleneck=st.integers(1, 9),
    kernels=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3),
    norm=st.sampled_from(["layer", "batch", None]),
    tokens=st.integers(1, 4),
    deep=st.booleans(),
    name=st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True),
)
def test_any_settings_survive_a_round_trip(bottleneck, kernels, norm, tokens, deep, name, tmp_path):
    mona = dl.MonaConfig(bottleneck=bottleneck, kernels=tuple(kernels), norm=norm)
    model = stir(dl.attach(tiny_vit(), [mona, dl.VPTConfig(num_tokens=tokens, deep=deep)], name)).eval()
    dl.save_pretrained(model, tmp_path / "any")
    again = dl.from_pretrained(tmp_path / "any", model=tiny_vit())
    ours, theirs = adapter_tensors(model, name), adapter_tensors(again, "default")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
