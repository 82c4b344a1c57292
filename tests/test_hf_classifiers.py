"""transformers' classifiers around adapters: class counts, losses, `pool` and `output`, names in files, peft."""

import copy
import inspect
import json
import warnings

import pytest
import torch
from hf_models import tiny
from models import randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.sites.output import class_count
from deltalens.tasks import ClassificationTask

transformers = pytest.importorskip("transformers", "5.0")

CLASSIFIERS = (
    *("ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification"),
    *("Dinov2WithRegistersForImageClassification", "BeitForImageClassification", "CLIPForImageClassification"),
    *("SiglipForImageClassification", "SwinForImageClassification", "Swinv2ForImageClassification"),
    *("ConvNextForImageClassification", "ConvNextV2ForImageClassification"),
)
LABELS = torch.tensor([1, 0])


def images(name="ViT", dtype=torch.float32):
    size = 64 if name.startswith("ConvNext") else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ------------------------------------------------------------------ how many classes
def test_class_counts_follow_the_adapter_and_come_back():
    model = tiny("ViTForImageClassification")
    names = dict(enumerate("abcde"))
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    before, ids = copy.deepcopy(model.config.to_dict()), model.config.id2label
    dl.attach(model, dl.MonaConfig(bottleneck=4), num_classes=3)
    assert (model.num_labels, model.config.num_labels, class_count(model)) == (3, 3, 3)
    dl.attach(model, dl.LinearConfig(), name="four", num_classes=4)
    assert model.config.num_labels == len(model.config.id2label) == 4
    assert model(images(), labels=torch.tensor([3, 0])).loss.isfinite()
    dl.set_adapter(model, "default")
    assert model.config.num_labels == 3
    model.config.problem_type = None  # what the library's loss wrote there
    with dl.disable_adapter(model):
        assert model.config.id2label is ids
    dl.detach(model)
    assert (model.config.to_dict(), model.num_labels) == (before, 5)
    assert model.config.id2label is ids


def test_bare_models_keep_their_configuration():
    model = tiny("ViTModel")
    before = model.config.to_dict()
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    assert class_count(model) is None
    assert model.config.to_dict() == before
    assert not hasattr(model, "num_classes")
    with pytest.raises(ValueError, match="no classifier layer"):
        dl.attach(tiny("ViTModel"), dl.MonaConfig(bottleneck=4), num_classes=3)


def test_the_task_trains_and_checks_the_count():
    model = dl.attach(tiny("ViTForImageClassification"), dl.LoRAConfig(r=2), num_classes=2)
    with pytest.raises(ValueError, match="2 outputs and the data 3"):
        ClassificationTask(model, ["a", "b", "c"])
    task = ClassificationTask(model, ["a", "b"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = task((images(), LABELS))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.allclose(
        model(images(), labels=LABELS).loss, nn.functional.cross_entropy(model(images()).logits, LABELS)
    )


# ------------------------------------------------------------------ pool and output
class _Same(nn.Module):
    """An `output` module that changes nothing and remembers that it was called."""

    calls = 0

    def forward(self, features, pictures):
        assert pictures.shape[1] == 3
        type(self).calls += 1
        return features


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_reading_of_a_classifier_is_the_librarys(name):
    """With an `output` module that changes nothing: the same type, logits, loss and recorded states."""
    model = tiny(name)
    options = {"labels": LABELS, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(images(name), **options)
        dl.attach(model, dl.LinearConfig())
        site = dl.describe(model).towers[0].classifier
        assert site.width == model.classifier.in_features
        from deltalens.lifecycle.attach import _slots_of

        _slots_of(site).put("output", "default", "same", _Same())
        site.module.delta.active = ("default",)
        calls = _Same.calls
        found = model(images(name), **options)
        assert _Same.calls == calls + 1
        flat = model(pixel_values=images(name), return_dict=False, **options)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert isinstance(flat, tuple)
    assert torch.equal(flat[1], found.logits)
    assert inspect.signature(type(model).forward) == inspect.signature(type(model)._base.forward)


POOLING = [
    ("ViTForImageClassification", "cls"),
    ("DeiTForImageClassification", "patches"),
    ("BeitForImageClassification", "prompts"),
    ("CLIPForImageClassification", "patches+prompts"),
    ("SiglipForImageClassification", "all"),
    ("Swinv2ForImageClassification", "patches"),
]


@pytest.mark.parametrize(("name", "pool"), POOLING)
def test_pooling(name, pool):
    """The head reads what `pool` says, through the norm that the backbone has behind its pooling."""
    deep = name.startswith("Swinv2")
    model = tiny(name)
    keeps = pool not in ("cls", "patches")
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3, deep=deep, pool=pool))).eval()
    base = getattr(model, {"CLIP": "vision_model", "Sigl": "vision_model"}.get(name[:4], name.split("For")[0].lower()))
    tokens = base(images()).last_hidden_state
    prefix = dl.describe(model).towers[0].layout.prefix
    kept = 0 if deep else 3
    assert not keeps or kept
    features = {
        "cls": tokens[:, 0],
        "patches": tokens[:, prefix + kept :].mean(1),
        "prompts": tokens[:, prefix : prefix + 3].mean(1),
        "patches+prompts": tokens[:, prefix:].mean(1),
        "all": tokens.mean(1),
    }[pool]
    features = model.beit.pooler.layernorm(features) if name.startswith("Beit") else features
    torch.testing.assert_close(model(images()).logits, model.classifier(features))


def test_no_pool_where_the_head_reads_two_things():
    with pytest.raises(TypeError, match="pool"):
        dl.attach(tiny("Dinov2ForImageClassification"), dl.VPTConfig(num_tokens=3, pool="cls"))
    with pytest.raises(TypeError, match="has none"):
        dl.attach(tiny("ViTModel"), dl.VPTConfig(num_tokens=3, pool="cls"))


# ------------------------------------------------------------------ names in files
PAIRS = [
    ("ViTForImageClassification", "ViTModel"),
    ("Dinov2ForImageClassification", "Dinov2Backbone"),
    ("CLIPForImageClassification", "CLIPVisionModel"),
    ("SiglipForImageClassification", "SiglipVisionModel"),
    ("SwinForImageClassification", "SwinModel"),
    ("ConvNextForImageClassification", "ConvNextBackbone"),
]


@pytest.mark.parametrize(("classifier", "bare"), PAIRS)
def test_adapters_travel_to_the_bare_model(classifier, bare, tmp_path):
    model, extractor = tiny(classifier), tiny(bare)
    own, prefix = dict(model.named_parameters()), None
    for prefix in ("", *(f"{name}." for name, _ in model.named_children())):
        if all(f"{prefix}{n}" in own for n, _ in extractor.named_parameters() if "encoder" in n or "layers" in n):
            break
    with torch.no_grad():
        for name, parameter in extractor.named_parameters():
            if f"{prefix}{name}" in own:
                parameter.copy_(own[f"{prefix}{name}"])
    randomize_adapter(dl.attach(model, dl.MonaConfig(bottleneck=4))).eval()
    dl.save_pretrained(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dl.load_adapter(extractor, tmp_path)
    count = 0
    for name, parameter in extractor.named_parameters():
        if "mona" in name:
            torch.testing.assert_close(parameter, dict(model.named_parameters())[f"{prefix}{name}"])
            count += 1
    assert count > 10


# ------------------------------------------------------------------ peft
def test_lora_travels_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    model = dl.attach(tiny("ViTForImageClassification"), dl.LoRAConfig(r=3, alpha=5.0, parts=("q", "v", "fc1")))
    randomize_adapter(model).eval()
    dl.save_pretrained(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert "vit.layers.0.attention.q_proj" in config["target_modules"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny("ViTForImageClassification"), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)

    settings = {"target_modules": ["q_proj", "fc2"], "r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}
    lora = peft.LoraConfig(init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(tiny("ViTForImageClassification"), lora).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = dl.from_pretrained(tmp_path / "theirs", model=tiny("ViTForImageClassification"))
    torch.testing.assert_close(ours(images()).logits, theirs(images()).logits, rtol=1e-4, atol=1e-5)


def test_peft_files_of_a_bare_model(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("ViTModel"), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    theirs.eval().save_pretrained(str(tmp_path))
    ours = dl.from_pretrained(tmp_path, model=tiny("ViTModel"))
    found, expected = ours(images()).last_hidden_state, theirs(images()).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
