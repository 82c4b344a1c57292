"""Seam: prompts that live on through Swin's stages beside the map (VPT-shallow), against published numbers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import images, randomize_adapter, tiny_swin
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer

import deltalens as dl
from deltalens.methods import VPTConfig

VECTORS = Path(__file__).parents[2] / "../shared/reference_vectors"
SIZES = {
    "swin4_shallow_p3": {
        "img_size": 64,
        "embed_dim": 12,
        "depths": (2,) * 4,
        "num_heads": (1, 2, 4, 8),
        "window_size": 4,
    },
    "swin2_shallow_p5": {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 7},
}
published = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")


def official(case: str):
    """(timm model with the case's weights and an adapter with its prompts and head, the case's tensors)."""
    vectors = load_file(VECTORS / f"vpt_{case}.safetensors")
    stored = load_file(VECTORS / f"vpt_{case.partition('_')[0]}_backbone.safetensors")
    renamed = {name.removeprefix("timm."): t for name, t in stored.items() if name.startswith("timm.")}
    weights = {name.removeprefix("repo.enc."): t for name, t in stored.items() if name.startswith("repo.enc.")}
    weights = {name: t for name, t in weights.items() if "downsample" not in name} | renamed
    norm = "patch_embed.norm.weight" in weights
    model = SwinTransformer(
        patch_size=4, num_classes=5, drop_path_rate=0.1, norm_layer=torch.nn.LayerNorm, **SIZES[case]
    )
    assert (model.patch_embed.norm.__class__ is torch.nn.LayerNorm) == norm
    heads = {"head.fc.weight", "head.fc.bias"}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == heads
    assert all(name.endswith(("relative_position_index", "attn_mask")) for name in unexpected)
    prompts = vectors["repo.enc.prompt_embeddings"][0]
    dl.attach(model.eval(), VPTConfig(num_tokens=len(prompts), deep=False))
    with torch.no_grad():
        embedding(model).copy_(prompts)
        model.head.fc.weight.copy_(vectors["repo.head.last_layer.weight"])
        model.head.fc.bias.copy_(vectors["repo.head.last_layer.bias"])
    return model, vectors


def embedding(model) -> torch.nn.Parameter:
    (name,) = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("embedding")]
    return model.get_parameter(name)


@published
@pytest.mark.parametrize("case", SIZES)
def test_published_outputs_whatever_the_batch(case):
    model, vectors = official(case)
    model.head.fc, fc = torch.nn.Identity(), model.head.fc
    together = model(vectors["input.image"])
    alone = torch.cat([model(image[None]) for image in vectors["input.image"]])
    for features in (together, alone):
        torch.testing.assert_close(features, vectors["out.feature_batch1"], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(fc(features), vectors["out.logits_batch1"], atol=2e-5, rtol=1e-5)
    # the official code lets the samples of a batch see each other's prompts; this one does not
    assert (together - vectors["out.feature_batch2_repo_mixing"]).abs().max() > 0.01


@published
@pytest.mark.parametrize("case", SIZES)
def test_published_gradients(case):
    model, vectors = official(case)
    names = [f"grad_sample{i}.enc.prompt_embeddings" for i in range(2)]
    for i, name in enumerate(names):
        model.zero_grad()
        F.cross_entropy(model(vectors["input.image"][i : i + 1]), vectors["input.target"][i : i + 1]).backward()
        torch.testing.assert_close(embedding(model).grad, vectors[name][0], atol=5e-6, rtol=1e-3)
    model.zero_grad()
    F.cross_entropy(model(vectors["input.image"]), vectors["input.target"], reduction="sum").backward()
    expected = sum(vectors[name][0] for name in names)
    torch.testing.assert_close(embedding(model).grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_never_come_out(deep):
    plain, model = tiny_swin(), tiny_swin()
    dl.attach(model, VPTConfig(num_tokens=3, deep=deep))
    randomize_adapter(model)
    x = images("swin")
    assert model.forward_features(x).shape == plain.forward_features(x).shape == (2, 4, 4, 24)
    for options in ({}, {"norm": True}, {"indices": [0], "stop_early": True}, {"intermediates_only": True}):
        found, expected = model.forward_intermediates(x, **options), plain.forward_intermediates(x, **options)
        if "intermediates_only" not in options:
            assert found[0].shape == expected[0].shape
            found, expected = found[1], expected[1]
        assert [y.shape for y in found] == [y.shape for y in expected]
    assert torch.equal(model.forward_features(x), model.forward_intermediates(x)[0])
    with dl.disable_adapter(model):
        assert torch.equal(model.forward_features(x), plain.forward_features(x))
        assert all(map(torch.equal, model.forward_intermediates(x)[1], plain.forward_intermediates(x)[1]))


def test_window_padding_and_other_image_sizes():
    """Maps that the windows do not divide, shifted windows, and a batch equal to its samples."""
    model = tiny_swin(strict_img_size=False).double()
    dl.attach(model, VPTConfig(num_tokens=3, deep=False))
    randomize_adapter(model)
    for size in ((32, 32), (40, 24), (36, 52)):
        x = images("swin", size=size).double()
        torch.testing.assert_close(model(x)[1:], model(x[1:]), atol=1e-12, rtol=0)
