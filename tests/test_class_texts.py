"""Classes in several templates and as sentences."""

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES, VECTORS, hf_model, open_clip_model, tokenizer, vectors, zero_shot

import deltalens as dl
from deltalens.backbones.names import SOURCE_KEY, source_of
from deltalens.methods import CoCoOpConfig, CoOpConfig, MMAConfig

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
THREE = ("itap of a {}.", "a bad photo of the {}.", "a photo of the large {}.")
SENTENCES = {
    "goldfish": ["a photo of a goldfish.", "itap of a goldfish."],
    "tabby_cat": ["a bad photo of the tabby cat."],
    "Annual Crop Land": ["a photo of a {}.", "itap of a {}.", "a photo of the large {}."],
    "sports car": ["a sports car."],
    "people playing violin": ["people playing violin.", "a people playing violin."],
    "large dog": ["a large dog."],
}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@needs_vectors
@pytest.mark.parametrize("make", [open_clip_model, hf_model])
def test_published_ensembles(make):
    given = vectors("clip_tip_adapter")
    for templates, wanted in (("a photo of a {}.", "clip_weights_single"), (THREE, "clip_weights_ensemble3")):
        with torch.no_grad():
            found = zero_shot(clip=make(), templates=templates).text_features()
        torch.testing.assert_close(found, given[wanted].T, atol=1e-6, rtol=1e-5)


def features_of(texts):
    model = open_clip_model()
    return F.normalize(model.encode_text(tokenizer()(texts)), dim=-1)


@torch.no_grad()
def test_sentences_of_each_class():
    model = zero_shot(descriptions=SENTENCES)
    wanted = [features_of([s.replace("{}", name.replace("_", " ")) for s in SENTENCES[name]]).mean(0) for name in NAMES]
    wanted = F.normalize(torch.stack(wanted), dim=-1)
    torch.testing.assert_close(model.text_features(), wanted, atol=1e-6, rtol=1e-5)
    in_order = zero_shot(descriptions=[SENTENCES[name] for name in NAMES])
    assert torch.equal(in_order.text_features(), model.text_features())
    model.set_classes(["large dog", "goldfish"])
    torch.testing.assert_close(model.text_features()[1], wanted[0], atol=1e-6, rtol=1e-5)
    model.set_classes(NAMES, THREE)
    assert torch.equal(model.text_features(), zero_shot(templates=THREE).text_features())
    model.set_classes(NAMES, descriptions=SENTENCES)
    torch.testing.assert_close(model.text_features(), wanted, atol=1e-6, rtol=1e-5)


def test_adapters_of_towers_see_sentences_contexts_their_own(images):
    model = dl.attach(zero_shot(descriptions=SENTENCES), MMAConfig(start=3, bottleneck=4, alpha=0.5))
    model.train()(images).sum().backward()
    assert len(model.prompts().ids) == 9
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad and p.dim() > 1)
    for config in (CoOpConfig(init="a photo of a"), CoCoOpConfig()):
        model = dl.attach(zero_shot(descriptions=SENTENCES), config)
        assert len(model.prompts().ids) == 5
        assert model(images).shape == (3, 5)


def test_files_name_the_sentences(tmp_path):
    model = zero_shot(descriptions=SENTENCES)
    model.__dict__[SOURCE_KEY] = {"name": "open_clip/tiny", "kwargs": {}, "checkpoint": None, "pretrained": True}
    kwargs = source_of(model).kwargs
    assert kwargs["descriptions"] == {name: SENTENCES[name] for name in NAMES}
    again = zero_shot(descriptions=kwargs["descriptions"])
    assert torch.equal(again.text_features(), model.text_features())


def test_errors_leave_the_classes():
    model = zero_shot(descriptions=SENTENCES)
    before = model.text_features()
    for names, texts, message in [
        (["goldfish", "cat"], None, "no sentences for 1 classes: cat"),
        (NAMES, {**SENTENCES, "sports car": []}, "no sentences for 1 classes: sports car"),
        (NAMES, [["a goldfish"]], "5 classes and descriptions of 1"),
        (NAMES, {**SENTENCES, "sports car": "a car"}, "that of sports car is one string"),
        (NAMES, {**SENTENCES, "sports car": ["a " * 90]}, "longer than the 77 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.set_classes(names, descriptions=texts)
        assert model.class_names == NAMES
        assert torch.equal(model.text_features(), before)
