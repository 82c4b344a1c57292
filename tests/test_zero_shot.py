"""Classifiers made of class names: equal to the library's own passes, whatever is left out, and never stale."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES, VECTORS, hf_model, open_clip_model, tokenizer, vectors, zero_shot
from models import randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.backbones.two_towers import two_towers_of
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods import AdapterConfig, BitFitConfig, LoRAConfig, Method, MMAConfig, MonaConfig, SSFConfig
from deltalens.tasks import ClassificationTask

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
TOWERS = {
    "open_clip": open_clip_model,
    "custom text": lambda: open_clip_model(custom_text=True),
    "pooled at eos": lambda: open_clip_model(custom_text=True, pool_type="eos", eos_id=29),
    "not causal": lambda: open_clip_model(custom_text=True, pool_type="last", no_causal_mask=True),
    "transformers": hf_model,
    "transformers, eager": lambda: hf_model(attn_implementation="eager"),
}
ADAPTERS = {
    "nothing": None,
    "MMA above block 2": MMAConfig(start=3, bottleneck=4, alpha=0.5),
    "MMA in the middle": MMAConfig(start=2, end=3, bottleneck=4, alpha=0.5),
    "LoRA": LoRAConfig(parts=("q", "v", "fc1")),
    "Adapter": AdapterConfig(bottleneck=4),
    "SSF": SSFConfig(),
    "BitFit": BitFitConfig(),
}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@needs_vectors
@pytest.mark.parametrize("make", [open_clip_model, hf_model, lambda: open_clip_model(custom_text=True)])
def test_published_zero_shot(make):
    model, given, wanted = zero_shot(clip=make()), vectors("clip_inputs"), vectors("clip_zeroshot")
    assert torch.equal(model.prompts().ids, given["token_ids_compact"])
    with torch.no_grad():
        torch.testing.assert_close(model(given["images"]), wanted["logits_per_image"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_text_features_are_those_of_the_whole_pass(tower, adapter):
    """Cut texts, a kept start and a single last row change nothing: forward and gradients in float64."""
    model = zero_shot(clip=TOWERS[tower]()).double()
    if ADAPTERS[adapter] is not None:
        dl.attach(model, ADAPTERS[adapter])
        randomize_adapter(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = model.prompts().ids
    tolerance = 1e-6 if "eager" in tower else 1e-12  # transformers' plain attention has a softmax in float32
    weights = torch.randn(len(NAMES), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(2):  # the second time from what was kept
        ours = model.text_features()
        gradients.append(_gradients((ours * weights).sum(), trained))
        whole = F.normalize(two_towers_of(model.clip).text(model.clip, ids), dim=-1)
        gradients.append(_gradients((whole * weights).sum(), trained))
        torch.testing.assert_close(ours, whole, atol=tolerance, rtol=0)
    for found in gradients[1:]:
        for one, other in zip(gradients[0], found, strict=True):
            torch.testing.assert_close(one, other, atol=100 * tolerance, rtol=0)


def _gradients(value, parameters):
    if not value.requires_grad:
        return []
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _shapes(model):
    """Shapes (texts, words) that the text blocks see, by block, as they are called."""
    seen, tower = [], next(t for t in dl.describe(model).towers if t.name == "text")
    for site in tower.blocks:
        site.module.attn.register_forward_pre_hook(lambda _, args, i=site.index: seen.append((i, args[0].shape[:2])))
    return seen


def test_what_is_left_out(images):
    model = zero_shot()
    dl.attach(model, MMAConfig(start=3, bottleneck=4))
    seen = _shapes(model)
    model.train()
    model(images)
    assert [i for i, _ in seen] == [0, 1, 2]  # of the last block one row is computed, not by the module
    assert all(shape[::-1] == (5, 10) or shape == (5, 10) for _, shape in seen)  # the longest text ends at word 10
    seen.clear()
    model(images)
    assert [i for i, _ in seen] == [2]  # what is below the first adapter was kept
    model.eval()
    with torch.no_grad():
        model(images)
        seen.clear()
        model(images)
    assert not seen  # without gradients, features are kept whole


def test_a_vision_adapter_leaves_texts_computed_once(images):
    model = zero_shot()
    dl.attach(model, LoRAConfig(), tower="vision")
    seen = _shapes(model)
    model.train()
    for _ in range(2):
        model(images).sum().backward()
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert all("visual" in name for name, p in model.named_parameters() if p.requires_grad)


CHANGES = {
    "a step": lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step(),
    "a frozen weight": lambda model: model.clip.transformer.resblocks[0].mlp.c_fc.weight.data.mul_(1.5),
    "the last norm": lambda model: model.clip.ln_final.weight.detach().mul_(torch.linspace(0.5, 2, 64)),
    "a loaded weight": lambda model: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}),
    "classes": lambda model: model.set_classes(["goldfish", "sports car"]),
    "templates": lambda model: model.set_classes(NAMES, "a bad photo of a {}."),
    "another adapter": lambda model: randomize_adapter(dl.attach(model, LoRAConfig(), name="second")),
    "none": lambda model: dl.set_adapter(model, ()),
}


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "a frozen weight"])
def test_nothing_is_stale(change, images):
    model = zero_shot()
    dl.attach(model, MMAConfig(start=3, bottleneck=4, alpha=0.5))
    randomize_adapter(model)
    with torch.no_grad():
        before = model.eval()(images)
    model.train()
    model(images).square().sum().backward()
    model.eval()
    with torch.no_grad():
        model(images)
        CHANGES[change](model)
        found = model.eval()(images)
        fresh = copy.deepcopy(model)
        assert torch.equal(found, fresh(images))
        assert found.shape != before.shape or not torch.allclose(found, before, atol=1e-5)


def test_changes_beside_autograd_count_from_the_next_train_or_eval(images):
    """`.data` is not counted by PyTorch."""
    model = zero_shot()
    with torch.no_grad():
        before = model(images)
        CHANGES["a frozen weight"](model)
        assert not torch.allclose(model.eval()(images), before)


def test_several_templates_are_averaged(images):
    templates = ("itap of a {}.", "a bad photo of the {}.", "a photo of the large {}.")
    model = zero_shot(templates=templates)
    with torch.no_grad():
        each = [F.normalize(zero_shot(templates=t).text_features(), dim=-1) for t in templates]
        torch.testing.assert_close(model.text_features(), F.normalize(torch.stack(each).mean(0), dim=-1))


def test_texts_in_chunks_are_the_same(monkeypatch):
    whole = zero_shot().text_features()
    monkeypatch.setattr("deltalens.backbones.text_pass.CHUNK", 2)
    torch.testing.assert_close(zero_shot().text_features(), whole, atol=1e-6, rtol=1e-5)


def test_an_ordinary_classifier(images, tmp_path):
    model = zero_shot()
    dl.attach(model, MMAConfig(start=2, bottleneck=4, alpha=0.5))
    randomize_adapter(model)
    with torch.no_grad():
        logits = model.eval()(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), logits)
        dl.save_pretrained(model, tmp_path)
        again = dl.from_pretrained(tmp_path, zero_shot())
        assert torch.equal(again(images), logits)
        again.set_classes(["goldfish", "sports car"])
        assert again(images).shape == (3, 2)
        plain = zero_shot()(images)
        dl.detach(model)
        assert torch.equal(model(images), plain)
    task = ClassificationTask(zero_shot(), NAMES)
    assert task((images, torch.tensor([0, 1, 4])))["output"].shape == (3, 5)


def test_a_context_behind_the_end_has_room(images):
    """A module of `text.embed` that writes behind the end gets as many words as it says."""

    class Behind(nn.Module):
        room = 3

        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(3, 64))

        def forward(self, x, layout):
            rows = torch.arange(len(x))[:, None]
            return x.index_put((rows, layout.ends[:, None] + 1 + torch.arange(3)), self.tokens.expand(len(x), -1, -1))

    class Pool(nn.Module):
        def forward(self, x, layout):
            return x[torch.arange(len(x))[:, None], layout.ends[:, None] + 1 + torch.arange(3)].mean(1)

    class Behinds(Method):
        name = "behinds"

        def place(self, anatomy):
            text = next(tower for tower in anatomy.towers if tower.name == "text")
            yield text.owner, "text.embed", Behind()
            yield text.owner, "text.pool", Pool()

    model = dl.attach(zero_shot(), Behinds())
    seen = _shapes(model)
    model.train()(images).sum().backward()
    assert seen[0][1][0] == 13 or seen[0][1][1] == 13
    (module,) = model.live("text.embed")
    assert module.tokens.grad.abs().sum() > 0


def test_errors():
    clip = open_clip_model()
    with pytest.raises(ValueError, match="goldfish twice"):
        ZeroShotClassifier(clip, tokenizer(), ["goldfish", "goldfish"])
    with pytest.raises(ValueError, match=r"a template has \{\}"):
        ZeroShotClassifier(clip, tokenizer(), ["goldfish"], "a photo")
    with pytest.raises(ValueError, match="longer than the 77 tokens"):
        ZeroShotClassifier(clip, tokenizer(), ["goldfish"], "a " * 90 + "{}")
    with pytest.raises(TypeError, match="Linear is no two-tower model"):
        ZeroShotClassifier(nn.Linear(2, 2), tokenizer(), ["goldfish"])
    with pytest.raises(ValueError, match="no tower 'audio'; it has vision, text"):
        dl.attach(zero_shot(), LoRAConfig(), tower="audio")
    with pytest.raises(TypeError, match="plain sequence"):
        dl.attach(zero_shot(), MonaConfig(bottleneck=4))
    dl.attach(zero_shot(), MonaConfig(bottleneck=4), tower="vision")
    with pytest.raises(ValueError, match="has no text tower"):
        dl.create_backbone("deltalens/vit-mini", class_names=["a"])


@torch.no_grad()
def test_whole_texts_are_computed_anew_in_another_precision():
    """A text tower that is not known inside: what autocast has computed is not used without it."""
    model = zero_shot(clip=open_clip_model(custom_text=True, embed_cls=True))
    assert two_towers_of(model.clip).reading(model.clip) is None
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = model(images)
    fine = model(images)
    model.kept.clear()
    assert torch.equal(fine, model(images))
    assert not torch.equal(fine, coarse.float())
