"""Settings of VPT that contradict each other, and what a model cannot do."""

import pytest
import torch
from models import images, randomize_adapter, tiny_convnext, tiny_resnet, tiny_swin, tiny_swin_v2, tiny_unread, tiny_vit

import deltalens as dl
from deltalens.methods import VPTConfig, make_config


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
        (tiny_swin_v2, {"location": "padding", "deep": False, "num_tokens": 4}, ValueError, "strict_img_size=False"),
        (tiny_unread, {"location": "padding", "deep": False, "num_tokens": 4}, ValueError, "create it with"),
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
    family = build.__name__.removeprefix("tiny_").removesuffix("_v2")
    x = images("swin" if family == "unread" else family)
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
