"""Models with several classifier layers: all of them are trained, saved and replaced when the classes change."""

import pytest
import timm
import torch
from matrix import LABELS, walk
from models import CLASSES, images, randomize, randomize_adapter, tiny_vit
from timm.models.crossvit import CrossVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.levit import LevitDistilled
from torch import nn

import deltalens as dl
from deltalens.backbones import describe
from deltalens.methods import LinearConfig, LoRAConfig, MLPConfig, MonaConfig, SidetuneConfig

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": CLASSES}


def tiny_distilled() -> VisionTransformerDistilled:
    return randomize(VisionTransformerDistilled(**TINY)).eval()


def tiny_hf_distilled() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    return randomize(DeiTForImageClassificationWithTeacher(config)).eval()


@pytest.mark.parametrize("row", ["Mona", "LoRA on q, v", "Linear", "VPT-deep"])
def test_every_step_of_a_life(row, tmp_path):
    walk(tiny_distilled, images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.parametrize("num_classes", [CLASSES, 3])
def test_both_heads_are_trained_and_saved(num_classes, tmp_path):
    model, x = dl.attach(tiny_distilled(), MonaConfig(bottleneck=4), num_classes=num_classes), images("vit")
    assert model.num_classes == num_classes
    assert (model.head.out_features, model.head_dist.out_features) == (num_classes, num_classes)
    assert dl.count_parameters(model).head == 2 * (24 + 1) * num_classes
    randomize_adapter(model)
    output = model(x)
    assert output.shape == (2, num_classes)
    output.sum().backward()
    assert all(p.grad is not None for head in (model.head, model.head_dist) for p in head.parameters())
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, tiny_distilled())(x), model.eval()(x))
    dl.detach(model)
    assert (model.head.out_features, model.head_dist.out_features, model.num_classes) == (CLASSES,) * 3
    assert torch.equal(model.eval()(x), tiny_distilled()(x))


def test_fresh_heads_are_not_copies_of_each_other():
    model = dl.attach(tiny_distilled(), LinearConfig(), num_classes=3)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


def test_lora_travels_in_peft_format(tmp_path):
    import peft

    model = randomize_adapter(dl.attach(tiny_distilled(), LoRAConfig(r=2, parts=("q", "v")), num_classes=3)).eval()
    dl.save_pretrained(model, tmp_path)
    plain = tiny_distilled()
    plain.reset_classifier(3)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    x = images("vit")
    torch.testing.assert_close(loaded(x), model(x))


def test_slots_that_need_one_classifier_layer_are_refused():
    for config in (SidetuneConfig(pretrained=False),):
        with pytest.raises(TypeError, match="Sidetune needs the features that a classifier layer reads"):
            dl.attach(tiny_distilled(), config)
    assert [tower.classifier for tower in describe(tiny_distilled()).towers] == [None]
    assert describe(tiny_vit()).towers[0].classifier is not None


def test_a_head_of_the_method_replaces_both():
    model = dl.attach(tiny_distilled(), MLPConfig(layers=2), num_classes=3)
    assert type(model.head) is type(model.head_dist) is not nn.Linear
    assert model.eval()(images("vit")).shape == (2, 3)


def test_transformers_with_a_teacher():
    model = tiny_hf_distilled()
    assert describe(model).heads == ["cls_classifier", "distillation_classifier"]
    x, expected = images("vit"), model(images("vit")).logits
    dl.attach(model, LinearConfig(), num_classes=3)
    assert model(x).logits.shape == (2, 3)
    assert torch.equal(dl.detach(model)(x).logits, expected)


# published architecture -> its classifier layers
PUBLISHED = {
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "efficientformer_l1": ["head", "head_dist"],
    "pit_ti_distilled_224": ["head", "head_dist"],
    "repvit_m0_9": ["head.head.l", "head.head_dist.l"],
    "crossvit_tiny_240": ["head.0", "head.1"],
    "volo_d1_224": ["head", "aux_head"],
    "resnetv2_50x1_bit": ["head.fc"],
    "vit_tiny_patch16_224": ["head"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    from deltalens.backbones.classifier import classes_of, find_heads

    with torch.device("meta"):
        model = timm.create_model(name)
        assert find_heads(model) == PUBLISHED[name]
        assert {classes_of(model.get_submodule(path)) for path in PUBLISHED[name]} == {model.num_classes}
        assert find_heads(timm.create_model(name, num_classes=0)) == []


def test_layers_inside_a_classifier_change_their_classes():
    """LeViT's heads are a BatchNorm and a linear layer; CrossViT has one head per branch."""
    levit = LevitDistilled(
        img_size=64, embed_dim=(16, 24), key_dim=8, depth=(2, 1), num_heads=(2, 3), num_classes=CLASSES
    )
    levit.pretrained_cfg = {"input_size": (3, 64, 64)}
    crossvit = CrossVit(
        img_size=48, patch_size=(12, 16), embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(2, 2, 1),
        num_classes=CLASSES,
    )  # fmt: skip
    crossvit.pretrained_cfg = {"input_size": (3, 48, 48)}
    for model, size in ((levit, 64), (crossvit, 48)):
        x = torch.randn(2, 3, size, size)
        expected = randomize(model).eval()(x)
        dl.attach(model, LinearConfig(), num_classes=3)
        assert model(x).shape == (2, 3)
        assert torch.equal(dl.detach(model)(x), expected)


def test_a_convolution_as_classifier(tmp_path):
    def make():
        from timm.models.resnetv2 import ResNetV2

        return randomize(ResNetV2((2, 1), (128, 128), num_classes=CLASSES, stem_chs=32)).eval()

    model, x = make(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert isinstance(model.get_classifier(), nn.Conv2d)
    with pytest.raises(TypeError, match="a convolution"):
        dl.attach(model, MLPConfig())
    dl.attach(model, MonaConfig(bottleneck=4), num_classes=3)
    assert randomize_adapter(model).eval()(x).shape == (2, 3)
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, make())(x), model(x))
    assert torch.equal(dl.detach(model)(x), expected)
