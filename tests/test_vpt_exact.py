"""Every form of VPT in float64 against the published one on unmodified timm networks: outputs and gradients."""

import plain_vpt
import pytest
import torch
from models import assert_same, backward, images, randomize_adapter, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, VPTConfig

EXACT = {"atol": 1e-10, "rtol": 1e-10}
ANY_SIZE = {"vit": {"dynamic_img_size": True}, "swin": {"strict_img_size": False}}
NETWORKS = {"vit": (tiny_vit, plain_vpt.vit), "swin": (tiny_swin, plain_vpt.swin)}
DEEP_SWIN = {"depths": (1, 2, 1), "num_heads": (1, 2, 4), "window_size": 2}

COMMON = {
    "deep": {},
    "shallow": {"deep": False},
    "shallow, removed": {"deep": False, "keep_prompts": False},
    "depth 2": {"depth": 2},
    "depth 2, removed": {"depth": 2, "keep_prompts": False},
    "depth 1": {"depth": 1},
    "reverse 2": {"depth": 2, "reverse": True},
    "intra": {"shared": "intra"},
    "intra, shallow": {"shared": "intra", "deep": False},
    "project": {"project": 5},
    "project, shallow": {"project": 5, "deep": False},
    "inter, project": {"project": 5, "shared": "inter"},
    "all, project": {"project": 5, "shared": "all"},
    "prefix": {"location": "prefix"},
    "prefix, shallow": {"location": "prefix", "deep": False},
    "prefix, intra": {"location": "prefix", "shared": "intra"},
    "prefix, reverse 1": {"location": "prefix", "depth": 1, "reverse": True},
    "add": {"location": "add"},
    "add, shallow": {"location": "add", "deep": False},
    "add-1": {"location": "add-1"},
    "add-1, depth 2": {"location": "add-1", "depth": 2},
    "add-1, project": {"location": "add-1", "project": 5, "shared": "inter"},
    "patches": {"pool": "patches"},
    "prompts": {"pool": "prompts"},
    "patches+prompts": {"pool": "patches+prompts"},
    "all tokens": {"pool": "all"},
    "patches, shallow": {"pool": "patches", "deep": False},
    "prompts, shallow": {"pool": "prompts", "deep": False},
    "prompts, depth 2": {"pool": "prompts", "depth": 2},
    "prompts, reverse 2": {"pool": "prompts", "depth": 2, "reverse": True},
    "prefix, patches": {"pool": "patches", "location": "prefix"},
    "prepend-pixel": {"location": "prepend-pixel", "deep": False},
    "prepend-pixel, prompts": {"location": "prepend-pixel", "deep": False, "pool": "prompts"},
    "concat-channel": {"location": "concat-channel", "deep": False},
}
VIT_ONLY = {
    "inter": {"shared": "inter"},
    "all": {"shared": "all"},
    "inter, depth 2": {"shared": "inter", "depth": 2},
    "prefix, inter": {"location": "prefix", "shared": "inter"},
    "prefix, all": {"location": "prefix", "shared": "all"},
    "add, inter": {"location": "add", "shared": "inter"},
    "add, project": {"location": "add", "project": 5},
    "cls": {"pool": "cls"},
}
CASES = [("vit", name, {}) for name in {**COMMON, **VIT_ONLY}] + [("swin", name, {}) for name in COMMON]
CASES += [("swin", name, DEEP_SWIN) for name in ("deep", "shallow", "depth 2", "project", "prefix", "prompts, shallow")]
CASES += [
    ("vit", name, options)
    for name in ("deep", "shallow", "prompts", "patches+prompts", "all tokens", "add", "prefix", "prepend-pixel")
    for options in (
        {"reg_tokens": 2, "init_values": 0.3},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False, "class_token": False},
    )
]


def both(family, config, beside=(), **options):
    """(output, gradients) of ours and of the plain form, with the adapted model."""
    factory, form = NETWORKS[family]
    model, x = factory(**options).double(), images(family).double()
    dl.attach(model, [config, *beside])
    randomize_adapter(model)
    found = backward(model, x)
    plain, tensors = plain_vpt.twin(factory(**options), model), plain_vpt.learned(model)
    expected = backward(Form(model, lambda x: form(plain, config, tensors, x)), x)
    return found, expected, model


class Form(nn.Module):
    """A function with the parameters of the adapted model, by the same names."""

    def __init__(self, model, form):
        super().__init__()
        self.__dict__.update(model=model, form=form)

    def forward(self, x):
        return self.form(x)

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)


def assert_exact(found, expected):
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    assert_same(found[1], expected[1], **EXACT)
    assert all(float(gradient.abs().max()) > 0 for name, gradient in found[1].items() if ".vpt." in name)


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_equals_the_published_form(family, name, options):
    found, expected, _ = both(family, VPTConfig(num_tokens=3, **{**COMMON, **VIT_ONLY}[name]), **options)
    assert_exact(found, expected)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("name", ["deep", "shallow", "depth 2", "project", "inter, project", "prompts"])
def test_beside_trained_biases(family, name):
    """VPT + Bias: keys and values of prompts follow the trained biases of norm and projection."""
    found, expected, model = both(family, VPTConfig(num_tokens=3, **COMMON[name]), [BitFitConfig()])
    assert_exact(found, expected)
    block = model.blocks[0] if family == "vit" else model.layers[0].blocks[0]
    assert block.attn.qkv.bias.grad.abs().max() > 0
    assert block.norm1.bias.requires_grad


@pytest.mark.parametrize("family", NETWORKS)
def test_padding(family):
    config = VPTConfig(num_tokens=4, location="padding", deep=False)
    found, expected, _ = both(family, config, **ANY_SIZE[family])
    assert_exact(found, expected)


@pytest.mark.parametrize("build", [tiny_convnext, tiny_resnet])
@pytest.mark.parametrize(("location", "count"), [("padding", 3), ("concat-channel", 2)])
def test_convolutional_networks(build, location, count):
    family = build.__name__.removeprefix("tiny_")
    model, x = build().double(), images(family).double()
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    config = VPTConfig(num_tokens=count, location=location, deep=False)
    dl.attach(model, config)
    randomize_adapter(model)
    found = backward(model, x)
    plain, tensors = plain_vpt.twin(build(), model), plain_vpt.learned(model)
    conv = plain.stem[0] if family == "convnext" else plain.conv1
    expected = backward(Form(model, lambda x: plain(plain_vpt.before_the_blocks(conv, config, tensors, x))), x)
    assert_exact(found, expected)
    names = {row.name.rpartition(".")[2] for row in dl.parameter_table(model) if row.kind == "inserted"}
    assert names == ({"tb", "lr"} if location == "padding" else {"image", "weight"})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["prefix", "depth 2", "prompts"])
@pytest.mark.parametrize("family", NETWORKS)
def test_with_either_attention_kernel(family, name, fused):
    factory, form = NETWORKS[family]
    model, x = factory().double(), images(family).double()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    config = VPTConfig(num_tokens=3, **COMMON[name])
    randomize_adapter(dl.attach(model, config))
    plain = plain_vpt.twin(factory(), model)
    torch.testing.assert_close(model(x), form(plain, config, plain_vpt.learned(model), x), **EXACT)


@pytest.mark.parametrize("name", [name for name in COMMON if name != "concat-channel"])
def test_samples_of_a_batch_do_not_see_each_other(name):
    """Swin, several windows: a batch equals its samples, in any company."""
    model, x = tiny_swin().double(), images("swin", batch=3).double()
    randomize_adapter(dl.attach(model, VPTConfig(num_tokens=3, **COMMON[name])))
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model(x[[2, 0]]), together[[2, 0]], atol=1e-12, rtol=1e-12)


def queried(model, x) -> list[int]:
    """Numbers of tokens that the blocks' MLPs see."""
    seen, handles = [], []
    for module in model.modules():
        if type(module).__name__ == "Mlp":
            handles.append(
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(1, -2).shape[1]))
            )
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_prompts_are_tokens_only_where_that_is_seen():
    """3 blocks, 17 tokens, 3 prompts: which blocks pay for prompts as tokens."""
    x = images("vit")
    for settings, expected in (
        ({}, [17, 17, 1]),
        ({"depth": 2}, [17, 20, 1]),
        ({"depth": 2, "keep_prompts": False}, [17, 17, 1]),
        ({"depth": 2, "reverse": True}, [17, 17, 1]),
        ({"deep": False}, [20, 20, 1]),
        ({"pool": "prompts"}, [17, 17, 20]),
        ({"pool": "patches"}, [17, 17, 17]),
        ({"location": "prefix"}, [17, 17, 1]),
        ({"location": "add"}, [17, 17, 1]),
    ):
        model = dl.attach(tiny_vit(), VPTConfig(num_tokens=3, **settings))
        assert queried(model, x) == expected, settings
    model = dl.attach(tiny_swin(), VPTConfig(num_tokens=3))
    assert queried(model, images("swin")) == [64, 64, 16, 16 + 3]
    model = dl.attach(tiny_swin(), VPTConfig(num_tokens=3, pool="patches"))
    assert queried(model, images("swin")) == [64, 64, 16, 16]
