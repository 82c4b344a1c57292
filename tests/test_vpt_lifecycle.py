"""VPT's forms through the lifecycle: counts, files, switching, merging."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import MODELS, backward, images, randomize_adapter, tiny_convnext, tiny_resnet, tiny_vit
from safetensors.torch import load_file, save_file
from test_counts import SWIN, VIT_B, count
from vpt_forms import ANY_SIZE, adapted, config_of, each_form

import deltalens as dl
from deltalens.methods import VPTConfig

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


@pytest.mark.slow
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
