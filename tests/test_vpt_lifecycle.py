"""VPT's forms through the lifecycle: counts, files, switching, merging, compiling, features, errors."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from models import (
    IMAGE_SIZE,
    MODELS,
    assert_same,
    backward,
    images,
    randomize_adapter,
    tiny_convnext,
    tiny_resnet,
    tiny_swin,
    tiny_swin_v2,
    tiny_vit,
)
from safetensors.torch import load_file, save_file
from test_counts import SWIN, VIT_B, count

import deltalens as dl
from deltalens.methods import VPTConfig, make_config

ANY_SIZE = {"vit": {"dynamic_img_size": True}, "swin": {"strict_img_size": False}, "convnext": {}, "resnet": {}}
FORMS = {
    "prefix": {"location": "prefix"},
    "add": {"location": "add"},
    "add-1": {"location": "add-1", "deep": False},
    "pixel": {"location": "prepend-pixel", "deep": False},
    "pixel, imagenet": {"location": "prepend-pixel", "deep": False, "init": "imagenet"},
    "channels": {"location": "concat-channel", "deep": False, "num_tokens": 1},
    "padding": {"location": "padding", "deep": False, "num_tokens": 4},
    "intra": {"shared": "intra"},
    "all, project": {"shared": "all", "project": 7},
    "project": {"project": 7},
    "prefix, all": {"location": "prefix", "shared": "all"},
    "depth 2": {"depth": 2, "pool": "patches+prompts"},
    "reverse 2": {"depth": 2, "reverse": True},
    "fixed": {"train_prompts": False},
    "prompts": {"pool": "prompts"},
}
SWIN_FORMS = [name for name in FORMS if name != "prefix, all"]


def config_of(name, **changes) -> VPTConfig:
    return VPTConfig(**{"num_tokens": 3, **FORMS[name], **changes})


def adapted(family, name, **options):
    model = MODELS[family](**{**ANY_SIZE[family], **options})
    return randomize_adapter(dl.attach(model, config_of(name)))


PAIRS = [("vit", name) for name in FORMS] + [("swin", name) for name in SWIN_FORMS]
each_form = pytest.mark.parametrize(("family", "name"), PAIRS)


# ------------------------------------------------------------------ counts
VIT_COUNTS = {
    "deep": ({"num_tokens": 50}, 50 * 768 * 12),
    "prefix": ({"num_tokens": 50, "location": "prefix"}, 2 * 50 * 768 * 12),
    "prefix, all": ({"num_tokens": 50, "location": "prefix", "shared": "all"}, 2 * 768),
    "intra": ({"shared": "intra"}, 12 * 768),
    "inter": ({"num_tokens": 50, "shared": "inter"}, 50 * 768),
    "all": ({"shared": "all"}, 768),
    "depth": ({"num_tokens": 10, "depth": 3}, 3 * 10 * 768),
    "project": ({"num_tokens": 50, "project": 64}, 50 * 64 * 12 + 65 * 768),
    "project, shallow": ({"num_tokens": 50, "project": 64, "deep": False}, 50 * 64 + 65 * 768),
    "add": ({"location": "add"}, 197 * 768 * 12),
    "add, shallow": ({"location": "add", "deep": False}, 197 * 768),
    "add-1": ({"location": "add-1"}, 768 * 12),
    "pixel": ({"num_tokens": 10, "location": "prepend-pixel", "deep": False}, 10 * 3 * 256),
    # the colours' weights and the bias are trained too: 769 times 768
    "channels": (
        {"num_tokens": 2, "location": "concat-channel", "deep": False},
        2 * 224**2 + 2 * 256 * 768 + 769 * 768,
    ),
    "fixed": ({"train_prompts": False}, 0),
}


@pytest.mark.parametrize("name", VIT_COUNTS)
def test_counts_on_vit_b(name):
    settings, expected = VIT_COUNTS[name]
    assert count(VIT_B, VPTConfig(**settings)).adapter == expected


def test_counts_of_the_frame():
    """2p (224 + 2p) + 2p 224 pixels of three colours; p=5: the paper's 13k."""
    settings = {"num_tokens": 5, "location": "padding", "deep": False}
    assert count("convnext_base", VPTConfig(**settings)).adapter == 3 * 10 * (234 + 224) == 13_740
    resnet = tiny_resnet()
    resnet.pretrained_cfg = {"input_size": (3, 224, 224)}
    assert dl.count_parameters(dl.attach(resnet, VPTConfig(**settings))).adapter == 13_740
    settings["num_tokens"] = 8
    found = count(VIT_B, VPTConfig(**settings), dynamic_img_size=True).adapter
    assert found == 3 * 16 * (240 + 224)


def test_counts_on_swin_b():
    """12,032 is the sum of the block widths."""
    swin = SWIN["b"]
    heads_times_width = 12_032
    assert count(swin, VPTConfig(num_tokens=7)).adapter == 7 * 12_032
    assert count(swin, VPTConfig(num_tokens=7, location="prefix")).adapter == 2 * 7 * heads_times_width
    assert count(swin, VPTConfig(shared="intra")).adapter == 12_032
    projections = (16 + 1) * (128 + 256 + 512 + 1024)
    assert count(swin, VPTConfig(num_tokens=7, project=16)).adapter == 7 * 16 * 24 + projections
    assert count(swin, VPTConfig(num_tokens=7, project=16, shared="inter")).adapter == 7 * 16 + projections
    tokens = 2 * 128 * 56**2 + 2 * 256 * 28**2 + 18 * 512 * 14**2 + 2 * 1024 * 7**2
    assert count(swin, VPTConfig(location="add")).adapter == tokens


# ------------------------------------------------------------------ files
@each_form
def test_round_trip_and_copies(family, name, tmp_path):
    model, x = adapted(family, name), images(family)
    expected = model(x)
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, model=MODELS[family](**ANY_SIZE[family]))
    assert torch.equal(again(x), expected)
    assert dl.count_parameters(again) == dl.count_parameters(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        output, _ = backward(other, x)
        torch.testing.assert_close(output, expected)


def test_shared_tensors_are_held_once(tmp_path):
    dl.save_pretrained(adapted("swin", "all, project"), tmp_path)
    names = {name for name in load_file(tmp_path / "adapter_model.safetensors") if not name.startswith("head")}
    start = "layers.0.blocks.0.attention_prompts.vpt."
    leaves = ["embedding", *(f"project.{width}.{leaf}" for width in (12, 24) for leaf in ("weight", "bias"))]
    assert names == {start + leaf for leaf in leaves}


def test_fixed_prompts_are_in_the_file_and_do_not_train(tmp_path):
    model, x = tiny_vit(), images("vit")
    dl.attach(model, config_of("fixed"))
    assert {row.kind for row in dl.parameter_table(model)} == {"head"}
    before = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("embedding")]
    assert len(before) == 3
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(x).sum().backward()
    optimiser.step()
    after = [buffer for name, buffer in model.named_buffers() if name.endswith("embedding")]
    assert all(map(torch.equal, before, after))
    dl.save_pretrained(model, tmp_path)
    assert sum("embedding" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 3


def test_a_fresh_process_gives_identical_logits(tmp_path):
    """Shared, projected, fixed and prototype prompts, a frame and channels, in one process for all."""
    cases = {
        "vit-mini": ["all, project", "fixed", "padding", "channels", "pixel", "prototypes", "depth 2"],
        "swin-mini": ["project", "prompts"],
    }
    options, inputs, outputs = {"padding": {"dynamic_img_size": True}}, {}, {}
    torch.manual_seed(0)
    for backbone, names in cases.items():
        for name in names:
            model = dl.create_backbone(f"deltalens/{backbone}", num_classes=4, **options.get(name, {}))
            prototypes = VPTConfig(num_tokens=4, init="cls-nolastl")
            config = prototypes if name == "prototypes" else config_of(name)
            x = torch.randn(4, *dl.preprocessing(model)["input_size"])
            dl.attach(model, config)
            config.prepare(model, [(x, torch.arange(4))])
            randomize_adapter(model).eval()
            folder = str(tmp_path / f"{backbone} {name}")
            dl.save_pretrained(model, folder)
            with torch.no_grad():
                inputs[folder], outputs[folder] = x, model(x)
    save_file(inputs, tmp_path / "x.safetensors")
    script = (
        "import sys, torch, deltalens as dl\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_grad_enabled(False)\n"
        "inputs = load_file(sys.argv[1])\n"
        "save_file({folder: dl.from_pretrained(folder)(x) for folder, x in inputs.items()}, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "x.safetensors", tmp_path / "y.safetensors"], check=True)
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == outputs.keys()
    for folder, expected in outputs.items():
        assert torch.equal(found[folder], expected), folder


# ------------------------------------------------------------------ on and off
@each_form
def test_switching_between_two_kinds_and_detaching(family, name):
    plain, x = MODELS[family](**ANY_SIZE[family]), images(family)
    pristine = plain(x)
    model = adapted(family, name)
    first = model(x)
    dl.attach(model, VPTConfig(num_tokens=2, deep=False), name="second")
    randomize_adapter(model, seed=2)
    second = model(x)
    alone = MODELS[family](**ANY_SIZE[family])
    dl.attach(alone, VPTConfig(num_tokens=2, deep=False))
    for (_, mine), (_, theirs) in zip(
        [(n, p) for n, p in alone.named_parameters() if p.requires_grad],
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        strict=True,
    ):
        mine.data.copy_(theirs.data)
    torch.testing.assert_close(second, alone(x), atol=1e-5, rtol=1e-4)
    dl.set_adapter(model, "default")
    assert torch.equal(model(x), first)
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), pristine, atol=1e-5, rtol=1e-4)
    dl.detach(model)
    assert torch.equal(model(x), pristine)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


@each_form
def test_merged_equals_unmerged(family, name):
    model, x = adapted(family, name).eval(), images(family)
    expected = model(x)
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in merged.parameters())
    held = [type(m).__name__ for m in merged.modules() if type(m).__name__ in ("Prompts", "PrefixKeysValues")]
    constants = [m for m in merged.modules() if type(m).__name__ == "ConstantKeysValues"]
    places = {"vit": 3, "swin": 4}[family]
    if config_of(name).location in ("prepend", "prefix"):
        wanted = 2 if config_of(name).depth else places
        assert len(held) + len(constants) == wanted
        assert len(constants) >= wanted - 1  # the last one may live on as tokens
        assert all(module.keys.shape[2] == 3 for module in constants)
    else:
        assert not constants


@pytest.mark.parametrize("family", ["convnext", "resnet"])
@pytest.mark.parametrize("name", ["padding", "channels"])
def test_convolutional_networks(family, name, tmp_path):
    plain, x = MODELS[family](), images(family)
    model = adapted(family, name)
    expected = model(x)
    assert (expected - plain(x)).abs().max() > 1e-3
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, model=MODELS[family]())(x), expected)
    torch.testing.assert_close(dl.merge_and_unload(copy.deepcopy(model).eval())(x), expected)
    dl.detach(model)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    assert torch.equal(model(x), plain(x))


def test_a_frame_and_channels_in_one_adapter():
    """Both slots of one module, in one adapter and in two."""
    x = images("convnext")
    for order in (("padding", "channels"), ("channels", "padding")):
        together = tiny_convnext()
        dl.attach(together, [config_of(name) for name in order])
        randomize_adapter(together)
        state = {name: p for name, p in together.named_parameters() if p.requires_grad}
        apart = dl.attach(tiny_convnext(), config_of(order[0]), name="a")
        dl.attach(apart, config_of(order[1]), name="b")
        dl.set_adapter(apart, ["a", "b"])
        names = {name.replace("vpt_2", "vpt").replace("adapter_default", "*"): p for name, p in state.items()}
        for name, parameter in apart.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(names[name.replace("adapter_a", "*").replace("adapter_b", "*")].data)
        torch.testing.assert_close(apart(x), together(x), atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize(("family", "name"), COMPILED)
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


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"location": "below"}, "must be one of"),
        ({"shared": "inner"}, "must be one of"),
        ({"init": "random"}, "must be one of"),
        ({"pool": "mean"}, "must be one of"),
        ({"location": "padding"}, "pass deep=False"),
        ({"location": "concat-channel"}, "pass deep=False"),
        ({"location": "prepend-pixel"}, "pass deep=False"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"project": 0}, "project must be at least 1"),
        ({"depth": 2, "deep": False}, "deep form"),
        ({"reverse": True}, "pass depth="),
        ({"keep_prompts": False}, "needs location='prepend' with"),
        ({"keep_prompts": False, "depth": 2, "location": "prefix"}, "needs location='prepend' with"),
        ({"shared": "intra", "location": "add"}, "location='add-1'"),
        ({"shared": "inter", "deep": False}, "pass deep=True"),
        ({"project": 8, "location": "prefix"}, "'prepend', 'add' or 'add-1'"),
        ({"dropout": 0.1, "location": "padding", "deep": False}, "dropout=0"),
        ({"init": "gaussian"}, "for pixels"),
        ({"init": "imagenet", "location": "concat-channel", "deep": False}, "for pixels"),
        ({"init": "final-cls", "shared": "inter"}, "without shared="),
        ({"init": "final-cls", "project": 8}, "without shared="),
        ({"init": "cls-nolastl", "location": "prefix"}, "class prototype"),
        ({"train_prompts": False, "project": 8}, "trains the head only"),
        ({"train_prompts": False, "location": "concat-channel", "deep": False}, "trains the head only"),
        ({"pool": "prompts", "location": "prefix"}, "reads prompts"),
        ({"pool": "prompts", "depth": 2, "keep_prompts": False}, "reads prompts"),
        ({"pool": "patches+prompts", "location": "padding", "deep": False}, "reads prompts"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config("vpt", **settings)


@pytest.mark.parametrize(
    ("build", "settings", "error", "message"),
    [
        (tiny_vit, {"depth": 4}, ValueError, "more than the 3 blocks"),
        (tiny_swin, {"shared": "inter"}, ValueError, r"different shapes: \(50, 12\), \(50, 24\); pass project=k"),
        (tiny_swin, {"shared": "all", "location": "prefix"}, ValueError, "different shapes"),
        (tiny_swin, {"shared": "inter", "location": "add"}, ValueError, "different shapes"),
        (tiny_swin, {"init": "final-cls"}, ValueError, "use init='cls-nolastl'"),
        (tiny_swin, {"pool": "cls"}, ValueError, "class token"),
        (tiny_vit, {"location": "padding", "deep": False, "num_tokens": 4}, ValueError, "dynamic_img_size=True"),
        (tiny_swin, {"location": "padding", "deep": False, "num_tokens": 4}, ValueError, "strict_img_size=False"),
        (tiny_swin_v2, {"location": "padding", "deep": False, "num_tokens": 4}, ValueError, "create it with"),
        (tiny_convnext, {}, TypeError, r"VPT-deep needs the slot 'attention\.prompts'.*ConvNeXtBlock"),
        (
            tiny_convnext,
            {"location": "add-1"},
            TypeError,
            r"VPT-deep with location='add-1' needs the slot 'tokens\.in'",
        ),
        (tiny_convnext, {"location": "padding", "deep": False, "pool": "patches"}, TypeError, "needs the slot 'pool'"),
        (tiny_resnet, {"deep": False, "location": "prepend-pixel"}, TypeError, r"slot 'tokens\.in'"),
    ],
)
def test_what_a_model_cannot_do_is_named(build, settings, error, message):
    model = build()
    x = images(build.__name__.removeprefix("tiny_").removesuffix("_v2"))
    before = model(x)
    with pytest.raises(error, match=message):
        dl.attach(model, VPTConfig(**settings))
    assert torch.equal(model(x), before)
    assert not any("delta" in name for name, _ in model.named_modules())


def test_frames_that_patches_do_not_divide():
    with pytest.raises(ValueError, match=r"images of 38x38 pixels.*multiple"):
        dl.attach(tiny_vit(dynamic_img_size=True), VPTConfig(num_tokens=3, location="padding", deep=False))
    model = tiny_vit(dynamic_img_size=True, dynamic_img_pad=True)
    randomize_adapter(dl.attach(model, VPTConfig(num_tokens=3, location="padding", deep=False)))
    assert model(images("vit")).shape == (2, 5)


def test_the_image_size_of_the_tests_is_the_models():
    for family in ("vit", "swin", "resnet"):
        assert dl.describe(MODELS[family]()).towers[0].image_size == (IMAGE_SIZE[family],) * 2
