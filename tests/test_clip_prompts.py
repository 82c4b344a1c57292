"""Tokens in both towers of CLIP: the published logits, losses and gradients, and plain computations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from clip_checks import MODELS, assert_published, fill, needs, trained, vit_b16
from clip_models import NAMES, hf_model, open_clip_model, tokenizer, vectors, zero_shot

import deltalens as dl
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods import MaPLeConfig, RPOConfig


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ plain passes of open_clip's towers
def text_pass(clip, embedded, ids, change=lambda i, x: x, mask=None):
    """Features (n, D) of embedded words (n, 77, d); change: (block's number from 0, its input) -> its input."""
    x = embedded + clip.positional_embedding
    for i, block in enumerate(clip.transformer.resblocks):
        x = block(change(i, x), attn_mask=clip.attn_mask if mask is None else mask)
    return clip.ln_final(x[torch.arange(len(x)), ids.argmax(-1)]) @ clip.text_projection


def image_pass(visual, images, tokens, change=lambda i, x: x):
    """Features (B, D) with tokens (p, C) at the end of the stream before the first norm."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, tokens.expand(len(x), -1, -1)], 1))
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(change(i, x))
    return visual.ln_post(x[:, 0]) @ visual.proj


def cosine_logits(clip, images, texts):
    return clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


# ------------------------------------------------------------------ MaPLe
def maple_parameters(model):
    """Parameters by the official names."""
    (first,), found = model.live("text.context"), {}
    found["ctx"] = first.ctx
    modules = list(model.modules())
    (shallow,) = [m for m in modules if type(m).__name__ == "CoupledTokens"]
    found |= {f"proj.{kind}": p for kind, p in shallow.proj.named_parameters()}
    for j, deep in enumerate(m for m in modules if type(m).__name__ == "DeepTokens"):
        found[f"compound_prompts_text.{j}"] = deep.words.ctx
        found |= {f"compound_prompt_projections.{j}.{kind}": p for kind, p in deep.proj.named_parameters()}
    return found


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("depth", [pytest.param(d, marks=needs(f"clip_maple_depth{d}")) for d in (1, 3)])
def test_published_maple(depth, make):
    given, inputs = vectors(f"clip_maple_depth{depth}"), vectors("clip_inputs")
    model = dl.attach(zero_shot(clip=MODELS[make]()), MaPLeConfig(depth=depth))
    parameters = maple_parameters(model)
    assert {f"grad.{name}" for name in parameters} == {name for name in given if name.startswith("grad.")}
    assert torch.equal(parameters["ctx"], given["init.ctx"])
    assert torch.equal(model.prompts().ids, given["token_ids_compact"])
    fill(parameters.values(), [given[f"param.{name}"] for name in parameters])
    assert_published(model, parameters, given, inputs["images"], inputs["labels"])


@pytest.mark.parametrize(("make", "depth"), [("open_clip", 2), ("open_clip", 4), ("transformers", 4)])
def test_deep_maple_is_what_a_plain_pass_says(depth, make, images):
    """Logits and gradients in float64 against open_clip's blocks run one by one."""
    images, plain = images.double(), open_clip_model().double()
    model = dl.attach(zero_shot(clip=MODELS[make]()).double(), MaPLeConfig(depth=depth)).train()
    parameters = maple_parameters(model)
    values = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}

    def tokens(i):
        name = f"compound_prompt_projections.{i - 1}" if i else "proj"
        return F.linear(words(i), values[f"{name}.weight"], values[f"{name}.bias"])

    def words(i):
        return values[f"compound_prompts_text.{i - 1}" if i else "ctx"]

    def in_text(i, x):
        return torch.cat([x[:, :1], words(i).expand(len(x), -1, -1), x[:, 3:]], 1) if 0 < i < depth else x

    def in_image(i, x):
        return torch.cat([x[:, :-2], tokens(i).expand(len(x), -1, -1)], 1) if 0 < i < depth else x

    ids = model.prompts().ids
    embedded = plain.token_embedding(ids)
    embedded = torch.cat([embedded[:, :1], words(0).expand(len(ids), -1, -1), embedded[:, 3:]], 1)
    texts = text_pass(plain, embedded, ids, in_text)
    expected = cosine_logits(plain, image_pass(plain.visual, images, tokens(0), in_image), texts)
    logits = model(images)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, values[name].grad, atol=1e-8, rtol=1e-8)


def test_maple_counts():
    model = vit_b16()
    for depth, count in ((9, 3_555_072), (3, 1_185_024)):
        dl.attach(model, MaPLeConfig(depth=depth))
        assert dl.count_parameters(model).adapter == count
        dl.detach(model)


def test_maple_is_saved_copied_and_taken_off(images, tmp_path):
    """What both towers share is one object after a copy and in files, and other classes can follow."""
    plain = zero_shot(clip=hf_model())
    with torch.no_grad():
        expected = plain(images)
    model = dl.attach(copy.deepcopy(plain), MaPLeConfig(depth=3)).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(images)
        assert not torch.allclose(logits, expected, atol=1e-3)
        dl.save_pretrained(model, tmp_path)
        for twin in (copy.deepcopy(model), dl.from_pretrained(tmp_path, copy.deepcopy(plain))):
            assert torch.equal(twin(images), logits)
            maple_parameters(twin)["ctx"].add_(1.0)
            tokens = next(m for m in twin.modules() if type(m).__name__ == "CoupledTokens")
            assert tokens.words.ctx is maple_parameters(twin)["ctx"]
        model.set_classes(NAMES[:2])
        torch.testing.assert_close(model(images), logits[:, :2], atol=1e-5, rtol=1e-5)
        model.set_classes(NAMES)
        assert torch.equal(dl.detach(model)(images), expected)


def resnet_clip():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=64)
    return CLIP(32, vision, CLIPTextCfg(vocab_size=30, width=16, heads=1, layers=3))


def uneven_clip():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=6, width=32, head_width=16, patch_size=16, image_size=32)
    return CLIP(16, vision, CLIPTextCfg(vocab_size=30, width=16, heads=1, layers=3))


def test_maple_counts_blocks_from_the_bottom(images):
    model = dl.attach(ZeroShotClassifier(uneven_clip(), tokenizer(), NAMES), MaPLeConfig(depth=3))
    model(images).sum().backward()
    sites = {name.partition(".delta")[0] for name in trained(model) if "blocks" in name}
    assert {name.rpartition(".")[2] for name in sites if "visual" in name} == {"1", "2"}
    assert all(p.grad is not None for p in trained(model).values())
    with pytest.raises(ValueError, match="depth=4 is beyond the 3 blocks"):
        dl.attach(ZeroShotClassifier(uneven_clip(), tokenizer(), NAMES), MaPLeConfig(depth=4))


def test_errors_of_prompts_in_both_towers(images):
    with pytest.raises(TypeError, match="image tower of transformer blocks; that of CLIP is made of Bottleneck"):
        dl.attach(ZeroShotClassifier(resnet_clip(), tokenizer(), NAMES), MaPLeConfig(depth=2))
    with pytest.raises(TypeError, match="needs an image tower"):
        dl.attach(zero_shot(), MaPLeConfig(depth=2), tower="text")
    with pytest.raises(ValueError, match="num_words=9, and init 'a photo of a' has 4 tokens"):
        dl.attach(zero_shot(), MaPLeConfig(depth=2, num_words=9))
    model = dl.attach(dl.attach(zero_shot(), MaPLeConfig(depth=2)), MaPLeConfig(depth=2), name="second")
    model(images)
    dl.set_adapter(model, ["default", "second"])
    with pytest.raises(ValueError, match="another adapter adds some, too"):
        model(images)


# ------------------------------------------------------------------ RPO
def rpo_parameters(model):
    tokens = next(m for m in model.modules() if type(m).__name__ == "TokensBehindThePrefix")
    return {"text_prompt": model.live("text.embed")[0].prompt, "img_prompt": tokens.prompt}


RPO_MODELS = MODELS | {"transformers, eager": lambda: hf_model(attn_implementation="eager")}


@needs("clip_rpo")
@pytest.mark.parametrize("make", RPO_MODELS)
def test_published_rpo(make):
    given, inputs = vectors("clip_rpo"), vectors("clip_inputs")
    model = dl.attach(zero_shot(clip=RPO_MODELS[make]()), RPOConfig(num_prompts=3))
    parameters = rpo_parameters(model)
    assert len(trained(model)) == 2
    fill(parameters.values(), [given[f"param.{name}"] for name in parameters])
    assert_published(model, parameters, given, inputs["images"], inputs["labels"])


@pytest.mark.parametrize("make", MODELS)
def test_what_prompts_read_is_what_clip_computes(make, images):
    """Behind every block the tokens of the image and the words of the texts are those without an adapter."""
    model = zero_shot(clip=MODELS[make]()).double()
    seen, towers = [], {tower.name: tower for tower in dl.describe(model).towers}
    for tower in towers.values():
        tower.blocks[2].module.register_forward_hook(lambda _, args, y: seen.append(y))
    with torch.no_grad():
        model(images.double())
        dl.attach(model, RPOConfig(num_prompts=3))
        model.kept.clear()
        model(images.double())
    plain_image, plain_text, image, text = seen
    assert image.shape[1] == plain_image.shape[1] + 3
    torch.testing.assert_close(torch.cat([image[:, :1], image[:, 4:]], 1), plain_image, atol=1e-12, rtol=0)
    for i, end in enumerate(model.prompts().ends):
        torch.testing.assert_close(text[i, : end + 1], plain_text[i, : end + 1], atol=1e-12, rtol=0)


def test_rpo_begins_near_the_end_and_the_class_token():
    model = dl.attach(zero_shot(), RPOConfig(num_prompts=5))
    parameters = rpo_parameters(model)
    for name, centre in (
        ("text_prompt", model.clip.token_embedding.weight[29]),
        ("img_prompt", model.clip.visual.class_embedding),
    ):
        distance = (parameters[name] - centre).norm(dim=-1)
        torch.testing.assert_close(distance, torch.full((5,), 0.1), atol=1e-4, rtol=1e-3)


def test_rpo_counts():
    assert dl.count_parameters(dl.attach(vit_b16(), RPOConfig())).adapter == 30_720


def test_rpo_life(images, tmp_path):
    """Several templates, other classes, files; texts too long for K words are named."""
    templates = ("a photo of a {}.", "a bad photo of the {}.")
    model, features = zero_shot(templates=templates), []
    dl.attach(model, RPOConfig(num_prompts=3)).eval()
    with torch.no_grad():
        logits = model(images)
        dl.save_pretrained(model, tmp_path)
        assert torch.equal(dl.from_pretrained(tmp_path, zero_shot(templates=templates))(images), logits)
        for template in templates:
            model.set_classes(NAMES, template)
            features.append(model.text_features())
        expected = F.normalize(torch.stack(features).mean(0), dim=-1)
        model.set_classes(NAMES, templates)
        torch.testing.assert_close(model.text_features(), expected, atol=1e-5, rtol=1e-5)
        model.set_classes(NAMES[:2])
        torch.testing.assert_close(model(images), logits[:, :2], atol=1e-5, rtol=1e-5)
        model.set_classes(["a " * 67])
        with pytest.raises(ValueError, match="RPO writes 3 words behind the end"):
            model(images)
    with pytest.raises(TypeError, match="image tower of transformer blocks"):
        dl.attach(ZeroShotClassifier(resnet_clip(), tokenizer(), NAMES), RPOConfig())
