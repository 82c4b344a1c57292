"""Stages of a tower: rows of the embedding, of every block and of the end, for images and texts."""

import numpy as np
import pytest
import timm
import torch
from clip_models import LAYERS, NAMES, OUT, TEXT_WIDTH, WIDTH, hf_model, open_clip_model, zero_shot
from models import randomize_adapter

import deltalens as dl
from deltalens.backbones.two_towers import two_towers_of
from deltalens.methods import CoCoOpConfig, CoOpConfig, LoRAConfig, MMAConfig, RPOConfig, VPTConfig
from deltalens.studies.layer_features import image_stages, readable_texts, text_stages

CLIPS = {
    "open_clip": open_clip_model,
    "custom text": lambda: open_clip_model(custom_text=True),
    "transformers": hf_model,
}
ADAPTERS = {
    "nothing": None,
    "MMA": MMAConfig(start=3, bottleneck=4, alpha=0.5),
    "LoRA": LoRAConfig(parts=("q", "v", "fc1")),
}
CLASSIFIERS = {"CoOp": CoOpConfig(init="a photo of a"), "RPO": RPOConfig(num_prompts=3)}
TEMPLATES = ("a photo of a {}.", "a rather bad photo of the large {}.")
STAGES = ("embed", *(str(i + 1) for i in range(LAYERS)))


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted(clip: str, adapter: str):
    model = zero_shot(clip=CLIPS[clip]())
    config = (ADAPTERS | CLASSIFIERS)[adapter]
    if config is not None:
        dl.attach(model, config)
        randomize_adapter(model)
    return model.eval()


def recorded(sites, call):
    """(what enters the first block, what leaves each) in a pass that somebody else makes."""
    seen = {}
    handles = [sites[0].module.register_forward_pre_hook(lambda _, args: seen.update(embed=args[0]))]
    for i, site in enumerate(sites):
        handles.append(site.module.register_forward_hook(lambda _, __, out, i=i: seen.update({str(i + 1): out})))
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return [seen[name][0] if isinstance(seen[name], tuple) else seen[name] for name in STAGES]


def tower(model, name):
    return next(each for each in dl.describe(model).towers if each.name == name)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_text_rows_are_those_of_a_whole_pass(clip, adapter, monkeypatch):
    """No word is cut off there and no row left out: the library's own `encode_text`, without our pass."""
    monkeypatch.setattr("deltalens.studies.layer_features.CHUNK", 4)  # ten texts in three parts
    model = adapted(clip, adapter)
    prompts = model.prompts_with(TEMPLATES, NAMES)
    found = text_stages(model, [prompts])
    assert found.names == (*STAGES, "proj")
    towers, features = two_towers_of(model.clip), []
    streams = recorded(tower(model, "text").blocks, lambda: features.append(towers.text(model.clip, prompts.ids)))
    for ours, stream in zip(found.features, streams, strict=False):
        assert ours.shape == (len(prompts.ids), TEXT_WIDTH)
        rows = stream[torch.arange(len(stream)), prompts.ends]
        np.testing.assert_allclose(ours, rows.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(found.features[-1], features[0].numpy(), atol=2e-5, rtol=1e-4)
    assert len({rows.tobytes() for rows in found.features[1:-1]}) == LAYERS


@torch.no_grad()
@pytest.mark.parametrize("adapter", CLASSIFIERS)
def test_words_that_adapters_put_around_the_texts(adapter, monkeypatch):
    """Of which the library's pass knows nothing: the classifier's own is the measure, one text of each class."""
    monkeypatch.setattr("deltalens.studies.layer_features.CHUNK", 2)
    model, plain = adapted("open_clip", adapter), zero_shot()
    found = text_stages(model, [model.prompts()])
    features = torch.from_numpy(found.features[-1])
    if adapter == "CoOp":
        torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), model.text_features())
    else:  # K words behind each end
        torch.testing.assert_close(features, model._raw(model.prompts(), None).mean(1), atol=1e-5, rtol=1e-4)
    blocks = tower(model, "text").blocks
    model.kept.clear()
    streams = recorded(blocks, lambda: model.features_of(model.prompts()))
    for ours, stream in zip(found.features, streams, strict=False):
        stream = stream[torch.arange(len(stream)), model.prompts().ends] if stream.shape[1] > 1 else stream[:, 0]
        np.testing.assert_allclose(ours, stream.numpy(), atol=2e-5, rtol=1e-4)
    changed = not np.allclose(found.features[1], text_stages(plain, [plain.prompts()]).features[1], atol=1e-3)
    assert changed == (adapter == "CoOp")  # read-only words are seen by nobody


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("adapter", ["nothing", "MMA", "LoRA"])
def test_image_rows_are_the_class_token(clip, adapter, images):
    model, features = adapted(clip, adapter), []
    found = image_stages(model, images.split(2))
    blocks = tower(model, "vision").blocks
    streams = recorded(blocks, lambda: features.append(two_towers_of(model.clip).image(model.clip, images)))
    for ours, stream in zip(found.features, streams, strict=False):
        assert ours.shape == (5, WIDTH)
        np.testing.assert_allclose(ours, stream[:, 0].numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(found.features[-1], features[0].numpy(), atol=2e-5, rtol=1e-4)
    assert found.features[-1].shape == (5, OUT)
    assert np.ptp(found.features[0], 0).max() < 1e-5  # the class token has seen nothing yet
    assert np.ptp(found.features[1], 0).max() > 1e-2


def test_adapters_change_what_lies_above_them_only(images):
    plain, model = adapted("open_clip", "nothing"), adapted("open_clip", "MMA")
    for one, other in (
        (image_stages(plain, [images]), image_stages(model, [images])),
        (text_stages(plain, [plain.prompts()]), text_stages(model, [model.prompts()])),
    ):
        changed = [not np.allclose(a, b, atol=1e-4) for a, b in zip(one.features, other.features, strict=True)]
        assert changed == [False, False, False, True, True, True]


NETWORKS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3),
    "no class token": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, class_token=False, global_pool="avg", reg_tokens=2, num_classes=0
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4),
        num_classes=3,
    ),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_without_texts(name, images):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    found = image_stages(model, [images])
    blocks = tower(model, "vision").blocks
    assert found.names == ("embed", *(str(i + 1) for i in range(len(blocks))), "head")
    assert readable_texts(model) is None
    with torch.no_grad():
        features = model.forward_head(model.eval().forward_features(images), pre_logits=True)
    np.testing.assert_allclose(found.features[-1], features.numpy(), atol=1e-5, rtol=1e-4)
    last = recorded_last(blocks[-1].module, lambda: model(images))
    wanted = {
        "vit": lambda x: x[:, 0],
        "no class token": lambda x: x[:, 2:].mean(1),
        "swin": lambda x: x.mean((1, 2)),
        "convnext": lambda x: x.mean((2, 3)),
    }
    np.testing.assert_allclose(found.features[-2], wanted[name](last).numpy(), atol=1e-5, rtol=1e-4)


def recorded_last(block, call):
    seen = []
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        call()
    handle.remove()
    return seen[0]


def test_tokens_of_adapters_are_not_counted(images):
    """Prompts live in the stream: the mean is that of the map, as the head takes it behind the last block."""
    model = NETWORKS["no class token"]()
    dl.attach(model, VPTConfig(num_tokens=3, deep=False))
    found = image_stages(randomize_adapter(model), [images])
    seen = recorded_last(model.blocks[0], lambda: model(images))
    assert seen.shape[1] == 2 + 3 + 4
    np.testing.assert_allclose(found.features[1], seen[:, 5:].mean(1).numpy(), atol=1e-5)


def test_an_adapter_of_one_tower_shows_both(images):
    model = dl.attach(zero_shot(), LoRAConfig(), tower="text")
    assert image_stages(model, [images]).tower == "vision"
    assert text_stages(model, [model.prompts()]).tower == "text"


def test_errors(images):
    closed = zero_shot(clip=open_clip_model(custom_text=True, embed_cls=True))
    with pytest.raises(TypeError, match="not known inside"):
        text_stages(closed, [closed.prompts()])
    model = dl.attach(zero_shot(), CoCoOpConfig())
    with pytest.raises(TypeError, match="anew for each image"):
        text_stages(model, [model.prompts()])
    with pytest.raises(ValueError, match="nothing to compute"):
        image_stages(zero_shot(), [])
    vit = NETWORKS["vit"]()
    vit.blocks[0].forward = lambda x: x[0]
    with pytest.raises(TypeError, match="batch in front was expected"):
        image_stages(vit, [images])
    assert not any(block._forward_hooks for block in vit.blocks)
