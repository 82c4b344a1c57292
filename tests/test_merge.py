"""Merging: the plain model computes the same as the adapted one."""

import copy

import pytest
import torch
from test_files import CONFIGS, stir, tiny_vit
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import deltalens as dl
from deltalens.sites.swap import Swapped


def tiny_swin():
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=3
    ).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_merged_equals_unmerged(build, config):
    model = stir(dl.attach(build(), config)).eval()
    merged = dl.merge_and_unload(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in merged.parameters())
    again = copy.deepcopy(merged)
    assert torch.equal(again(x), merged(x))


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("name", ["lora", "bitfit", "full", "linear"])
def test_weight_methods_leave_a_plain_model(build, name):
    plain = build()
    merged = dl.merge_and_unload(stir(dl.attach(build(), CONFIGS[name])))
    assert not any(isinstance(module, Swapped) for module in merged.modules())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_merged_prompts_need_no_projection():
    """The prompts' keys and values are constants: the block's qkv sees patch tokens only, and only theirs."""
    model = stir(dl.attach(tiny_vit(), dl.VPTConfig(num_tokens=6)))
    merged = dl.merge_and_unload(model)
    constants = [m for m in merged.modules() if type(m).__name__ == "ConstantKeysValues"]
    assert len(constants) == 2
    assert constants[0].keys.shape == (1, 2, 6, 12)


def test_merging_keeps_the_active_adapter_only():
    model = stir(dl.attach(tiny_vit(), CONFIGS["mona"]))
    stir(dl.attach(model, CONFIGS["lora"], "second"), seed=2)
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert type(model) is type(tiny_vit())
    with pytest.raises(ValueError, match="no adapters"):
        dl.set_adapter(model, "default")


def test_attach_to_a_merged_model_is_refused():
    merged = dl.merge_and_unload(dl.attach(tiny_vit(), CONFIGS["mona"]))
    with pytest.raises(ValueError, match="merged"):
        dl.attach(merged, CONFIGS["lora"])


def test_mona_layer_folds_alone():
    layer = dl.MonaLayer(12, 8).eval()
    stir(layer)
    x = torch.randn(2, 5, 7, 12)
    expected = layer(x)
    torch.testing.assert_close(nn.Sequential(layer.folded())(x), expected)
