"""Seam: the slots at both ends of a network: `image` and `stem.parallel` in front, `pool` and `output` behind."""

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, assert_same, backward, images, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import Method, VPTConfig


class Brighten(nn.Module):
    """image: f(image) -> image"""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.25))

    def forward(self, image):
        return self.gain * image


class Convolve(nn.Module):
    """stem.parallel: f(image) -> a change of the convolution's output that depends on the image"""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.stride, self.padding = nn.Parameter(conv.weight.detach().flip(0)), conv.stride, conv.padding

    def forward(self, image):
        return F.conv2d(image, self.weight, None, self.stride, self.padding)


class Scale(nn.Module):
    """output: f(features, images) -> features"""

    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, features, pixels):
        return features * self.factor + pixels.mean((1, 2, 3))[:, None]


class Largest(nn.Module):
    """pool: f(tokens, layout) -> the largest value of each channel over the map, plus the first prefix token"""

    def forward(self, tokens, layout):
        feature_map, prefix = layout.split(tokens)
        found = feature_map.amax((1, 2))
        return found if prefix is None else found + prefix[:, 0]


class Ends(Method):
    name = "ends"

    def __init__(self, *slots):
        self.__dict__["slots"] = slots

    def place(self, anatomy):
        tower = anatomy.towers[0]
        for slot in self.slots:
            if slot == "image":
                yield tower.image, slot, Brighten()
            elif slot == "stem.parallel":
                yield tower.stem, slot, Convolve(tower.stem.module)
            elif slot == "pool":
                yield tower.classifier, slot, Largest()
            else:
                yield tower.classifier, slot, Scale(tower.classifier.width)


def features_of(model, x, pools):
    """What the head's linear layer reads, of a plain network."""
    tokens = model.forward_features(x)
    if not pools:
        return model.forward_head(tokens, pre_logits=True)
    if tokens.dim() == 4:
        return tokens.amax((1, 2))
    return model.fc_norm(tokens[:, model.num_prefix_tokens :].amax(1) + tokens[:, 0])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("slots", [("image",), ("stem.parallel",), ("output",), ("image", "stem.parallel", "output")])
def test_equals_an_explicit_computation(family, slots):
    model, plain, x = MODELS[family]().double(), MODELS[family]().double(), images(family).double()
    expected_plain = plain(x)
    dl.attach(model, Ends(*slots))
    parameters = dict(model.named_parameters())
    conv = next(m for m in plain.modules() if isinstance(m, nn.Conv2d))
    if "stem.parallel" in slots:
        change = next(p for name, p in parameters.items() if "stem_parallel" in name)
        conv.weight = nn.Parameter(conv.weight.detach() + change.detach())
    pixels = 1.25 * x if "image" in slots else x
    features = features_of(plain, pixels, False)
    if "output" in slots:  # it gets the images as they were given
        factor = next(p for name, p in parameters.items() if name.endswith("factor"))
        features = features * factor + x.mean((1, 2, 3))[:, None]
    torch.testing.assert_close(model(x), model.get_classifier()(features), atol=1e-10, rtol=1e-10)
    _, gradients = backward(model, x)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), expected_plain, atol=1e-10, rtol=1e-10)
    dl.detach(model)
    assert torch.equal(model(x), expected_plain)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny_vit, {}),
        (tiny_vit, {"reg_tokens": 2}),
        (tiny_vit, {"global_pool": "avg", "fc_norm": True}),
        (tiny_vit, {"global_pool": "map"}),
        (tiny_swin, {}),
    ],
)
def test_pooling_is_the_modules(build, options):
    model, plain, x = build(**options), build(**options), images("vit")
    dl.attach(model, Ends("pool", "output"))
    factor = next(p for name, p in model.named_parameters() if name.endswith("factor"))
    features = features_of(plain, x, True) * factor + x.mean((1, 2, 3))[:, None]
    torch.testing.assert_close(model(x), model.get_classifier()(features), atol=1e-5, rtol=1e-5)
    assert model.forward_features(x).shape == plain.forward_features(x).shape


def test_output_modules_are_chained_in_order():
    model, x = tiny_vit(), images("vit")
    plain = features_of(tiny_vit(), x, False)
    dl.attach(model, Ends("output"), name="a")
    dl.attach(model, Ends("output"), name="b")
    dl.set_adapter(model, ["a", "b"])
    first, second = (p for name, p in model.named_parameters() if name.endswith("factor"))
    mean = x.mean((1, 2, 3))[:, None]
    expected = (plain * first + mean) * second + mean
    torch.testing.assert_close(model(x), model.head(expected), atol=1e-5, rtol=1e-5)


def test_a_pool_sees_the_tokens_that_adapters_added_and_nobody_else_does():
    seen = []
    model, x = tiny_vit(), images("vit")
    dl.attach(model, [VPTConfig(num_tokens=3, deep=False), Ends("pool")])
    (pool,) = model.delta.live("pool")
    pool.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[1]))
    model(x)
    assert seen == [1 + 3 + 16]
    assert model.forward_intermediates(x)[0].shape[1] == 17
    dl.set_adapter(model, ())
    assert model.forward_features(x).shape[1] == 17


def test_checkpointed_forms_agree():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, [VPTConfig(num_tokens=3, pool="patches+prompts"), Ends("image", "stem.parallel", "output")])
    output, gradients = backward(model.train(), x)
    model.set_grad_checkpointing()
    again, same = backward(model, x)
    torch.testing.assert_close(again, output)
    assert_same(same, gradients, atol=1e-5, rtol=1e-4)
