"""What becomes of a classifier made of class names: merged, compiled, exported."""

import copy
import pickle

import pytest
import torch
from clip_models import NAMES, hf_model, open_clip_model, zero_shot
from models import randomize_adapter

import deltalens as dl
from deltalens.backbones.text_pass import TextPass
from deltalens.methods import CLIPAdapterConfig, CoCoOpConfig, CoOpConfig, LoRAConfig, MMAConfig, TipAdapterConfig

MODELS = {
    "open_clip": open_clip_model,
    "custom text": lambda: open_clip_model(custom_text=True),
    "transformers": hf_model,
}
ADAPTERS = {
    "nothing": None,
    "MMA": MMAConfig(start=2, bottleneck=4, alpha=0.5),
    "LoRA": LoRAConfig(parts=("q", "v")),
    "CoOp": CoOpConfig(num_words=2),
    "features": [CLIPAdapterConfig(towers="both"), TipAdapterConfig(passes=1)],
}


def pictures(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def adapted(adapter, make=open_clip_model, **options):
    model = zero_shot(clip=make(), **options)
    if ADAPTERS[adapter] is not None:
        randomize_adapter(dl.attach(model, ADAPTERS[adapter]))
        dl.prepare(model, [(pictures(7), torch.arange(7) % 5)])
    return model.eval()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_image_classifier_is_the_model(adapter, make):
    model, images = adapted(adapter, MODELS[make]), pictures(3)
    logits = model(images)
    plain = model.image_classifier()
    torch.testing.assert_close(plain(images), logits, atol=1e-5, rtol=1e-5)
    assert not any(part in name for name, _ in plain.named_parameters() for part in ("text", "token"))
    assert not [name for name, _ in plain.named_parameters() if name.startswith(("clip.transformer", "clip.ln_final"))]
    assert (plain.num_classes, plain.class_names, plain.training) == (5, NAMES, False)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(twin(images), plain(images))
    before = plain(images)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert torch.equal(plain(images), before)  # a copy


CASES = [("MMA", "transformers"), ("features", "open_clip")]


@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_image_classifier_exports(adapter, make):
    plain, images = adapted(adapter, MODELS[make]).image_classifier(), pictures(3)
    with torch.no_grad():
        exported = torch.export.export(plain, (images,), strict=False).module()
        torch.testing.assert_close(exported(images), plain(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_image_classifier_compiles(adapter, make):
    torch.compiler.reset()
    plain, images = adapted(adapter, MODELS[make]).image_classifier(), pictures(3)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", ["open_clip", "transformers"])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "nothing"])
@torch.no_grad()
def test_merged(adapter, make):
    model, images = adapted(adapter, MODELS[make]), pictures(3)
    logits = model(images)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(images), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.image_classifier()(images), logits, atol=1e-5, rtol=1e-5)
    merged.set_classes(NAMES)
    torch.testing.assert_close(merged(images), logits, atol=1e-5, rtol=1e-5)
    if adapter == "LoRA":
        assert type(merged) is type(zero_shot())
        assert not any("delta" in name for name, _ in merged.named_modules())
        merged.set_classes(NAMES[:2])
        torch.testing.assert_close(merged(images), logits[:, :2], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_model(monkeypatch):
    """The image side is compiled, texts are kept as ever, and nothing is stale."""
    torch.compiler.reset()
    model, images, passes = adapted("MMA"), pictures(2), []
    run = TextPass._run
    monkeypatch.setattr(TextPass, "_run", lambda self, *args: passes.append(1) or run(self, *args))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = copy.deepcopy(model)(images)
        passes.clear()
        for _ in range(2):
            torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)
    assert len(passes) == 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(m(images).square().sum(), parameters) for m in (compiled, model))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        parameters[0].add_(1.0)
        torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(compiled(images), expected)


def test_texts_of_each_image_are_refused():
    model = dl.attach(zero_shot(), CoCoOpConfig())
    with pytest.raises(TypeError, match="ConditionalContext writes the classes' texts anew for each image"):
        model.image_classifier()
    with dl.disable_adapter(model):
        assert model.image_classifier()(pictures(1)).shape == (1, 5)
