"""torch.compile without graph breaks and torch.export, forward and backward."""

import pytest
import torch
from models import METHODS, MODELS, PAIRS, assert_same, backward, images, randomize_adapter, tiny_vit

import deltalens as dl
from deltalens.methods import MonaConfig, VPTConfig

# one adapter of several methods where they combine: tracing is slow; `slow` runs more, and every method alone
COMBINED = [
    ("vit", ("mona", "lora", "bitfit")),
    ("vit", ("vpt-shallow",)),
    ("swin", ("vpt-deep",)),
    ("resnet", ("mona", "bitfit")),
]
MORE = [
    ("vit", ("vpt-deep",)),
    ("vit", ("lora", "ssf", "fact", "repadapter", "convpass")),
    ("swin", ("mona", "lora", "bitfit")),
    ("swin", ("vpt-shallow",)),
    ("swin", ("fact-tk", "ssf", "repadapter", "convpass")),
    ("convnext", ("mona", "lora-mlp", "bitfit")),
    ("convnext", ("ssf", "fact-mlp", "repadapter")),
    ("resnet", ("ssf",)),
]
ALONE = [(family, (method,)) for family, method in PAIRS if not method.startswith("vpt")]
SHORT = {
    "vit": {"depth": 2},
    "swin": {"depths": (2, 1)},
    "convnext": {"depths": (1, 1, 1, 1)},
    "resnet": {"layers": (2, 1, 1, 1)},
}
SHORTEST = {"vit": {"depth": 1}, "swin": {"depths": (2,), "num_heads": (2,)}}  # where nothing passes between blocks
each_case = pytest.mark.parametrize(
    ("family", "methods"), [*COMBINED, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in [*MORE, *ALONE]]]
)


def adapted(family, methods):
    size = SHORTEST.get(family, SHORT[family]) if "mona" in methods else SHORT[family]
    model = dl.attach(MODELS[family](**size), [METHODS[method] for method in methods])
    return randomize_adapter(model)


@each_case
def test_compiled_equals_eager(family, methods):
    torch.compiler.reset()
    model, x = adapted(family, methods), images(family)
    output, expected = backward(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    found = compiled(x)
    torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(grads, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_compiled_at_several_image_sizes():
    """The recorded grid is not baked into a graph that serves other sizes."""
    torch.compiler.reset()
    model = tiny_vit(dynamic_img_size=True, depth=2)
    dl.attach(model, [MonaConfig(bottleneck=4, dropout=0.0), VPTConfig(num_tokens=2)])
    randomize_adapter(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (48, 32), (40, 56)):
        x = images("vit", size=size)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_follows_a_switch():
    torch.compiler.reset()
    model, x = tiny_vit(depth=2), images("vit")
    plain = model(x)
    dl.attach(model, METHODS["lora"], name="a")
    randomize_adapter(model)
    dl.attach(model, METHODS["vpt-deep"], name="b")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    second = compiled(x)
    dl.set_adapter(model, "a")
    first = compiled(x)
    torch.testing.assert_close(first, model(x), atol=1e-5, rtol=1e-4)
    assert (first - second).abs().max() > 1e-3
    with dl.disable_adapter(model):
        torch.testing.assert_close(compiled(x), plain, atol=1e-5, rtol=1e-4)


@each_case
def test_exported_equals_eager(family, methods):
    model, x = adapted(family, methods), images(family)
    output = model(x)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), output, atol=1e-5, rtol=1e-4)
    other = images(family, seed=3)
    torch.testing.assert_close(exported(other), model(other), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@each_case
def test_inductor_equals_eager(family, methods):
    torch.compiler.reset()
    model, x = adapted(family, methods), images(family)
    output, expected = backward(model, x)
    found, grads = backward(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(found, output, atol=1e-4, rtol=1e-3)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in grads.items()}, expected, atol=1e-3, rtol=1e-2)
