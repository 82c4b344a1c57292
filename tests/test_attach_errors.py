"""Bad requests are refused with the reason, and leave the model as it was."""

import pytest
import torch
from models import images, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import (
    BitFitConfig,
    FullConfig,
    LinearConfig,
    LoRAConfig,
    Method,
    MonaConfig,
    VPTConfig,
    make_config,
)

MONA = MonaConfig(bottleneck=4)


class Picky(Method):
    """A method that yields what the test tells it to."""

    name = "picky"

    def __init__(self, slot="mlp.inner", tensors=(), on="blocks"):
        self.__dict__.update(slot=slot, tensors=tensors, on=on)

    def place(self, anatomy):
        if self.on == "blocks":
            for block in anatomy.blocks():
                yield block, self.slot, nn.Linear(block.width, block.width)

    def unfreeze(self, anatomy):
        return self.tensors


def snapshot(model):
    return (
        [(name, type(m), m.training) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        sorted(model.__dict__),
    )


CASES = {
    "no configuration": (tiny_vit, [], {}, TypeError, "takes a method configuration"),
    "a class instead of an object": (tiny_vit, MonaConfig, {}, TypeError, "takes a method configuration"),
    "a string": (tiny_vit, ["mona"], {}, TypeError, "takes a method configuration"),
    "name with a dot": (tiny_vit, MONA, {"name": "a.b"}, ValueError, "'a.b' must consist of letters"),
    "empty name": (tiny_vit, MONA, {"name": ""}, ValueError, "must consist of letters"),
    "missing slot": (
        tiny_convnext,
        Picky("attention.inner"),
        {},
        TypeError,
        "Picky needs the slot 'attention.inner', which ConvNeXtBlock",
    ),
    "unknown slot": (
        tiny_vit,
        Picky("attention.middle"),
        {},
        TypeError,
        "needs the slot 'attention.middle'.*It offers: .*mlp.inner",
    ),
    "second method cannot": (
        tiny_convnext,
        [MONA, VPTConfig()],
        {},
        TypeError,
        "VPT-deep needs the slot 'attention.prompts'",
    ),
    "unknown tensor": (tiny_vit, Picky(tensors=["blocks.9.norm1.bias"]), {}, ValueError, "blocks.9.norm1.bias"),
    "matches nothing": (tiny_vit, Picky(on="nothing"), {}, ValueError, "matches nothing in VisionTransformer"),
    "no such layer": (
        tiny_vit,
        LoRAConfig(target_modules=("query",)),
        {},
        ValueError,
        "matches no layer of VisionTransformer",
    ),
    "the patch embedding": (tiny_vit, LoRAConfig(target_modules=("proj",)), {}, ValueError, "patch embedding"),
    "the head": (tiny_vit, LoRAConfig(target_modules="head"), {}, ValueError, "belongs to the head"),
    "no linear layer": (tiny_vit, LoRAConfig(target_modules=("norm1",)), {}, ValueError, "is a LayerNorm"),
    "no head to replace": (
        lambda: tiny_vit(num_classes=0),
        MONA,
        {"num_classes": 3},
        ValueError,
        "num_classes=3 was given",
    ),
    "nothing to train": (lambda: tiny_vit(num_classes=0), LinearConfig(), {}, ValueError, "nothing would be trained"),
    "no such submodule": (
        tiny_vit,
        MONA,
        {"backbone": "encoder"},
        AttributeError,
        "no submodule 'encoder'; its children are: patch_embed",
    ),
    "no such blocks": (tiny_resnet, MONA, {"blocks": r"stages\.\d+"}, TypeError, "no repeated blocks found in ResNet"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_reason_and_without_a_trace(case):
    factory, config, options, error, message = CASES[case]
    model = factory()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        dl.attach(model, config, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", CASES)
def test_refused_beside_an_adapter_that_stays_active(case):
    factory, config, options, error, _ = CASES[case]
    model, x = factory(), images("convnext" if factory in (tiny_convnext, tiny_resnet) else "vit")
    dl.attach(model, BitFitConfig(), name="first")
    before, output = snapshot(model), model(x)
    if "backbone" in options or "blocks" in options:
        error = ValueError  # further adapters share the first one's
    with pytest.raises(error):
        dl.attach(model, config, **{"name": "second", **options})
    assert snapshot(model) == before
    assert dl.active_adapters(model) == ("first",)
    assert torch.equal(model(x), output)


def test_a_block_whose_layer_is_not_linear():
    """A quantised or otherwise replaced layer is found out before anything changes."""
    model = tiny_vit()
    model.blocks[2].mlp.fc2 = nn.Sequential(nn.Linear(96, 24))
    before = snapshot(model)
    with pytest.raises(TypeError, match="Sequential"):
        dl.attach(model, LoRAConfig(parts=("q", "fc2")))
    assert snapshot(model) == before


def test_duplicate_name():
    model = dl.attach(tiny_vit(), MONA)
    before = snapshot(model)
    with pytest.raises(ValueError, match="already an adapter named 'default'; pass another name= or delete_adapter"):
        dl.attach(model, BitFitConfig())
    assert snapshot(model) == before
    dl.delete_adapter(model, "default")
    dl.attach(model, BitFitConfig())


def test_unknown_names_say_which_are_known():
    model = dl.attach(dl.attach(tiny_vit(), MONA, name="one"), MONA, name="two")
    for call in (
        lambda: dl.set_adapter(model, "three"),
        lambda: dl.set_adapter(model, ["one", "three"]),
        lambda: dl.delete_adapter(model, "three"),
        lambda: dl.adapter_info(model, "three"),
    ):
        with pytest.raises(ValueError, match="no adapter named 'three'; known adapters: one, two"):
            call()
    assert dl.active_adapters(model) == ("two",)


def test_a_model_without_adapters():
    for call in (
        dl.detach,
        dl.active_adapters,
        dl.merge_and_unload,
        lambda m: dl.set_adapter(m, "a"),
        dl.count_parameters,
    ):
        with pytest.raises(ValueError, match=r"VisionTransformer has no adapters: call deltalens\.attach"):
            call(tiny_vit())


def test_further_adapters_share_the_backbone():
    wrapper = nn.Sequential(tiny_vit(num_classes=0), nn.Linear(24, 3))
    dl.attach(wrapper, MONA, name="a", backbone="0")
    with pytest.raises(ValueError, match="first adapter was attached with backbone='0'"):
        dl.attach(wrapper, MONA, name="b", backbone="1")
    dl.attach(wrapper, MONA, name="b", backbone="0")
    dl.attach(wrapper, MONA, name="c")
    assert wrapper(images("vit")).shape == (2, 3)


def test_script_modules():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), tiny_vit())
    with pytest.raises(TypeError, match=r"is a ScriptModule.*attach to the eager model"):
        dl.attach(model, MONA)


def test_a_model_inside_an_adapted_one_and_a_merged_model():
    wrapper = nn.Sequential(tiny_vit(num_classes=0), nn.Linear(24, 3))
    dl.attach(wrapper, MONA, backbone="0")
    with pytest.raises(ValueError, match="merged adapter or sits inside an adapted one"):
        dl.attach(wrapper[0], BitFitConfig())
    model = dl.merge_and_unload(dl.attach(tiny_vit(), MONA))
    with pytest.raises(ValueError, match="merged adapter"):
        dl.attach(model, BitFitConfig())


def test_patch_dropout_with_a_spatial_method():
    model, x = tiny_vit(patch_drop_rate=0.5), images("vit")
    dl.attach(model, MONA)
    model.eval()(x)
    with pytest.raises(RuntimeError, match="patch dropout or token pruning"):
        dl.attach(tiny_vit(patch_drop_rate=0.5).train(), MONA).train()(x)
    dl.attach(tiny_vit(patch_drop_rate=0.5), LoRAConfig(r=2)).train()(x).sum().backward()


def test_a_block_that_is_called_before_its_embedding():
    model = dl.attach(tiny_vit(), MONA)
    with pytest.raises(RuntimeError, match="the patch embedding of this tower has not run"):
        model.blocks[0](torch.randn(1, 17, 24))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mone", {}, "unknown method 'mone'; did you mean mona"),
        ("mona", {"bottelneck": 3}, "no setting 'bottelneck'; did you mean bottleneck"),
        ("mona", {"bottleneck": 0}, "at least 1"),
        ("mona", {"kernels": [2]}, "odd sizes"),
        ("mona", {"kernels": []}, "odd sizes"),
        ("mona", {"reduce": "max"}, "must be one of"),
        ("mona", {"norm_position": "output"}, "must be one of"),
        ("lora", {"r": 0}, "at least 1"),
        ("lora", {"parts": []}, "parts is empty"),
        ("vpt", {"num_tokens": 0}, "at least 1"),
        ("vpt", {"dropout": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(name, **settings)


def test_lora_on_a_part_that_the_block_lacks():
    with pytest.raises(
        TypeError, match=r"needs the slot 'weights:qkv', which Block \(blocks\.0\) of VisionTransformer.*weights:fc1"
    ):
        dl.attach(tiny_vit(), LoRAConfig(parts=("qkv",)))
    with pytest.raises(TypeError, match=r"set target_modules to layer names.*weights:q"):
        dl.attach(tiny_resnet(), LoRAConfig())


def test_prompts_at_a_classifier_whose_features_are_asked_for_work_everywhere():
    for model in (tiny_vit(), tiny_swin()):
        dl.attach(model, [VPTConfig(num_tokens=2, deep=False), FullConfig()])
        model(images("vit")).sum().backward()
