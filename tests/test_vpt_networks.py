"""What surrounds VPT's prompts: other tokens, other image sizes, compiling, precision, other networks."""

import itertools

import pytest
import torch
from models import (
    IMAGE_SIZE,
    MODELS,
    assert_same,
    backward,
    images,
    randomize,
    randomize_adapter,
    tiny_swin,
    tiny_unread,
    tiny_vit,
)
from timm.models.beit import Beit
from vpt_forms import ANY_SIZE, FORMS, adapted, config_of, each_form

import deltalens as dl
from deltalens.methods import MonaConfig, VPTConfig


# ------------------------------------------------------------------ around the blocks
@each_form
def test_prompts_never_come_out(family, name):
    plain, model, x = MODELS[family](**ANY_SIZE[family]), adapted(family, name), images(family)
    grown = "padding" in name
    for options in ({}, {"norm": True, "indices": 1}, {"intermediates_only": True}):
        found, expected = (m.forward_intermediates(x, **options) for m in (model, plain))
        if "intermediates_only" not in options:
            assert grown or found[0].shape == expected[0].shape
            found, expected = found[1], expected[1]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape[:2] == theirs.shape[:2]
            assert grown or ours.shape == theirs.shape
            assert not grown or ours.shape[2] == theirs.shape[2] * 40 // 32
    if not FORMS[name].get("pool"):
        assert grown or model.forward_features(x).shape == plain.forward_features(x).shape


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("name", ["add", "padding", "channels", "pixel", "prefix", "depth 2"])
def test_other_image_sizes(family, name):
    """Learned maps, frames and channels are resized; at the native size nothing is."""
    model = adapted(family, name)
    native = model(images(family))
    for size in ((48, 32), (24, 64)):
        x = images(family, size=size)
        output, _ = backward(model, x)
        torch.testing.assert_close(model(x[1:]), output[1:], atol=1e-5, rtol=1e-4)
    assert torch.equal(model(images(family)), native)


def test_added_tokens_are_resized_bilinearly():
    from deltalens.methods.vpt_prompts import AddedTokens
    from deltalens.sites.layout import Tokens

    module = AddedTokens(1, (4, 4), 6, 1.0)
    with torch.no_grad():
        ramp = torch.arange(4.0)[:, None] + 10 * torch.arange(4.0)
        module.embedding[1:] = ramp.reshape(16, 1).expand(-1, 6)
        y = module(torch.zeros(2, 1 + 8 * 4, 6), Tokens(1, (8, 4)))
    assert torch.equal(y[0, :1], module.embedding[:1])
    rows = y[0, 1:, 0].view(8, 4)[:, 0]
    torch.testing.assert_close(rows, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_adding_leaves_other_adapters_tokens_alone():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, [VPTConfig(num_tokens=2, deep=False), VPTConfig(location="add")])
    randomize_adapter(model)
    (added,) = model.blocks[1].delta.live("tokens.in")
    seen = []
    added.register_forward_hook(lambda m, args, y: seen.append(y - args[0]))
    model(x)
    change = seen[0]
    assert change.shape == (2, 1 + 2 + 16, 24)
    assert not change[:, 1:3].any()
    torch.testing.assert_close(torch.cat([change[0, :1], change[0, 3:]]), added.embedding, atol=1e-5, rtol=1e-4)


def test_swin_blocks_that_get_no_tokens_return_maps():
    for settings in ({"location": "add"}, {"location": "add-1"}):
        model = dl.attach(tiny_swin(), VPTConfig(**settings))
        kinds: list[type] = []
        for stage in model.layers:
            for block in stage.blocks:
                block.register_forward_hook(lambda m, args, y, kinds=kinds: kinds.append(type(y)))
        model(images("swin"))
        assert kinds == [torch.Tensor] * 4


def test_dropout_masks_are_of_one_sample_and_block():
    for settings, slot in (
        ({"deep": False}, "tokens.in"),
        ({"project": 5}, "attention.prompts"),
        ({"shared": "intra"}, "attention.prompts"),
        ({"location": "add-1"}, "tokens.in"),
        ({"location": "prefix"}, "attention.prompts"),
    ):
        torch.manual_seed(0)
        model = dl.attach(tiny_vit(), VPTConfig(num_tokens=6, dropout=0.5, **settings))
        blocks = model.blocks[:1] if settings.get("deep") is False else model.blocks
        masks = []
        for block in blocks:
            (module,) = block.delta.live(slot)
            module.dropout.register_forward_hook(lambda m, args, y, masks=masks: masks.append(y != 0))
        model.train()(images("vit", batch=4))
        assert len(masks) == len(blocks) * (2 if settings.get("location") == "prefix" else 1)
        for mask in masks:
            assert len(mask) == 4
            assert not torch.equal(mask[0], mask[1])
            assert 0.2 < mask.float().mean() < 0.8
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
        masks.clear()
        assert torch.equal(model.eval()(images("vit")), model(images("vit")))


COMPILED = [
    ("vit", "prefix"),
    ("vit", "all, project"),
    ("vit", "depth 2"),
    ("vit", "padding"),
    ("swin", "prompts"),
    ("swin", "add"),
    ("convnext", "channels"),
]
SHORT = {"vit": {"depth": 2}, "swin": {"depths": (1, 1)}, "convnext": {"depths": (1, 1, 1, 1)}}


@pytest.mark.parametrize(
    ("family", "name"), [COMPILED[0], *[pytest.param(*pair, marks=pytest.mark.slow) for pair in COMPILED[1:]]]
)
def test_compiled_and_exported_equal_eager(family, name):
    torch.compiler.reset()
    model, x = adapted(family, name, **SHORT[family]), images(family)
    output, expected = backward(model, x)
    found, grads = backward(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)
    assert_same({n.removeprefix("_orig_mod."): g for n, g in grads.items()}, expected, atol=1e-4, rtol=1e-3)
    exported = torch.export.export(model, (x,), strict=False).module()
    other = images(family, seed=3)
    torch.testing.assert_close(exported(other), model(other), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ networks of no known family
class Wrapped(torch.nn.Module):
    """A backbone inside a model with a head of its own."""

    def __init__(self):
        super().__init__()
        self.body = tiny_vit(num_classes=0, dynamic_img_size=True)
        self.classify = torch.nn.Linear(24, 3)

    def forward(self, x):
        return self.classify(self.body(x))


def tiny_beit():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return randomize(Beit(**settings)).eval()


@pytest.mark.parametrize(
    ("build", "forms"),
    [
        (tiny_beit, ["channels"]),  # the convolution both receives the pixels and gives the grid that Mona needs
        (lambda: tiny_unread(strict_img_size=False), ["padding"]),
        (lambda: tiny_unread(strict_img_size=False), ["channels", "padding"]),
    ],
    ids=["beit", "post-norm", "post-norm, both"],
)
def test_pixel_prompts_on_networks_of_no_known_family(build, forms, tmp_path):
    model, x = build(), images("vit")
    plain, image = model(x), dl.describe(model).towers[0].image
    dl.attach(model, [*map(config_of, forms), MonaConfig(bottleneck=4)])
    randomize_adapter(model)
    _, gradients = backward(model, x)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if ".vpt" in name)
    again = dl.describe(model).towers[0].image  # the adapted model is described as the plain one
    assert (again.path, again.family) == (image.path, image.family)
    dl.save_pretrained(model.eval(), tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, model=build())(x), model(x))
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-4)
    dl.detach(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", ["padding", "channels", "prefix", "add", "depth 2"])
def test_a_named_backbone(name, tmp_path):
    torch.manual_seed(0)
    model, x = Wrapped().eval(), images("vit")
    plain = model(x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = config_of(name, pool=None)
    randomize_adapter(dl.attach(model, config, backbone="body"))
    expected, _ = backward(model, x)
    dl.save_pretrained(model, tmp_path)
    fresh = Wrapped().eval()
    fresh.load_state_dict(state)
    assert torch.equal(dl.from_pretrained(tmp_path, model=fresh)(x), expected)
    dl.detach(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("name", ["prefix", "add", "all, project", "pixel", "pixel, imagenet", "channels", "padding"])
def test_half_precision(family, name):
    """bf16 autocast and a bf16 model are as near to float32 as eight bits of mantissa allow."""
    model, x = adapted(family, name), images(family)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        found.float().sum().backward()
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    found = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.04 * expected.abs().max()


def test_the_image_size_of_the_tests_is_the_models():
    for family in ("vit", "swin", "resnet"):
        assert dl.describe(MODELS[family]()).towers[0].image_size == (IMAGE_SIZE[family],) * 2
