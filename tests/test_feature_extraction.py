"""Feature extraction, other image sizes, register tokens: what surrounds the blocks stays as timm has it."""

import pytest
import torch
from models import METHODS, MODELS, PAIRS, backward, images, randomize_adapter, tiny_swin, tiny_vit
from timm.models._features import FeatureGetterNet, FeatureListNet
from timm.models.resnet import ResNet

import deltalens as dl
from deltalens.methods import FullConfig, MonaConfig, VPTConfig

each_pair = pytest.mark.parametrize(("family", "method"), PAIRS)
SPATIAL_PAIRS = [pair for pair in PAIRS if pair[0] in ("vit", "swin")]
ANY_SIZE = {"vit": {"dynamic_img_size": True}, "swin": {"strict_img_size": False}}


def adapted(family, method, **kwargs):
    model = dl.attach(MODELS[family](**kwargs), METHODS[method])
    return randomize_adapter(model)


@each_pair
def test_forward_intermediates_shapes_are_the_backbones(family, method):
    plain, model, x = MODELS[family](), adapted(family, method), images(family)
    for options in ({}, {"norm": True, "indices": 2}, {"stop_early": True, "indices": [0]}):
        check_intermediates(plain, model, x, options)


def check_intermediates(plain, model, x, options):
    (final, found), (plain_final, expected) = (m.forward_intermediates(x, **options) for m in (model, plain))
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert final.shape == plain_final.shape
    only = model.forward_intermediates(x, intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(only, found, strict=True))
    if not options:
        assert torch.equal(final, model.forward_features(x))
    with dl.disable_adapter(model):
        assert all(
            torch.equal(a, b) for a, b in zip(model.forward_intermediates(x, **options)[1], expected, strict=True)
        )


@pytest.mark.parametrize("method", [method for family, method in PAIRS if family == "vit"])
@pytest.mark.parametrize("registers", [0, 4])
def test_vit_output_formats(method, registers):
    """Prefix tokens come out where asked for, added tokens never."""
    plain, x = tiny_vit(reg_tokens=registers), images("vit")
    model = adapted("vit", method, reg_tokens=registers)
    for options in (
        {"output_fmt": "NLC"},
        {"return_prefix_tokens": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
    ):
        found, expected = (m.forward_intermediates(x, intermediates_only=True, **options) for m in (model, plain))
        for a, b in zip(found, expected, strict=True):
            pairs = zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
            assert all(y.shape == z.shape for y, z in pairs)
        with dl.disable_adapter(model):
            same = model.forward_intermediates(x, intermediates_only=True, **options)
        for a, b in zip(same, expected, strict=True):
            pairs = zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
            assert all(torch.equal(y, z) for y, z in pairs)
    found, expected = (m.forward_intermediates(x, output_dict=True, return_prefix_tokens=True) for m in (model, plain))
    assert found.keys() == expected.keys()
    assert found["image_features"].shape == expected["image_features"].shape
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize(("family", "method"), SPATIAL_PAIRS)
def test_dynamic_and_non_square_sizes(family, method):
    """Batch statistics aside, a sample's output does not depend on which sizes came before."""
    plain, model = MODELS[family](**ANY_SIZE[family]), adapted(family, method, **ANY_SIZE[family])
    outputs = {}
    for size in ((32, 32), (48, 32), (24, 64), (32, 32)):
        x = images(family, size=size)
        outputs.setdefault(size, model(x))
        assert torch.equal(model(x), outputs[size])
        found, expected = (m.forward_intermediates(x, intermediates_only=True) for m in (model, plain))
        assert [y.shape for y in found] == [y.shape for y in expected]
        backward(model, x)


@pytest.mark.parametrize("method", [method for family, method in PAIRS if family == "vit"])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_register_tokens_and_pooling(method, pool):
    options = {"reg_tokens": 4, "global_pool": pool}
    plain, model, x = tiny_vit(**options), adapted("vit", method, **options), images("vit")
    assert model.forward_features(x).shape == plain.forward_features(x).shape == (2, 1 + 4 + 16, 24)
    output, _ = backward(model, x)
    full = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(output, full, atol=1e-5, rtol=1e-4)


def test_prefix_tokens_bypass_spatial_modules():
    model, x = tiny_vit(reg_tokens=4), images("vit")
    dl.attach(model, MonaConfig(bottleneck=4))
    randomize_adapter(model)
    block = model.blocks[0]
    (mona,) = block.delta.live("attention.stream")
    seen = []
    mona.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    inputs = []
    block.norm2.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    block.attn.proj_drop.register_forward_hook(lambda m, args, y: inputs.append(y))
    block.norm1.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x)
    before = inputs[0] + inputs[1]  # x + attention(norm1 x)
    (feature_map, adapted_map), after = seen[0], inputs[2]
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 5:].unflatten(1, (4, 4)), feature_map)
    assert torch.equal(after[:, 5:].unflatten(1, (4, 4)), adapted_map)


# ------------------------------------------------------------------ features_only
def getter(model):
    return FeatureGetterNet(model, out_indices=(0, 1))


def lister(model):
    return FeatureListNet(model, out_indices=(1, 2), flatten_sequential=not isinstance(model, ResNet))


def swin_lister(model):
    return FeatureListNet(model, out_indices=(0, 1), flatten_sequential=True)


FORMS = [("vit", getter), ("swin", swin_lister), ("swin", getter), ("convnext", lister), ("resnet", lister)]


@pytest.mark.parametrize(
    ("family", "form", "method"), [(f, form, m) for f, form in FORMS for family, m in PAIRS if family == f]
)
def test_features_only_networks(family, form, method):
    """Same blocks under other paths: adapts, keeps its shapes, comes off again."""
    network, x = form(MODELS[family]()).eval(), images(family)
    expected = network(x)
    network.pretrained_cfg = {"input_size": tuple(x.shape[1:])}
    dl.attach(network, METHODS[method])
    randomize_adapter(network)
    found = network(x)
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, expected, strict=True))
    sum(y.sum() for y in found).backward()
    dl.detach(network)
    assert all(torch.equal(a, b) for a, b in zip(network(x), expected, strict=True))


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_classifier_and_features_have_the_same_canonical_names(family, form):
    plain, network = MODELS[family](), form(MODELS[family]())
    network.pretrained_cfg = {"input_size": tuple(images(family).shape[1:])}
    classifier, features = dl.describe(plain), dl.describe(network)
    names = {classifier.canonical(path) for path, _ in classifier.backbone_parameters()}
    found = {features.canonical(path): path for path, _ in features.backbone_parameters()}
    assert found.keys() <= names
    weights = plain.state_dict()
    assert all(torch.equal(network.get_parameter(path), weights[name]) for name, path in found.items())
    blocks = [classifier.canonical(block.path) for block in classifier.blocks()]
    assert [features.canonical(block.path) for block in features.blocks()] == blocks[: len(features.blocks())]


def test_an_adapter_trained_on_features_gives_the_classifiers_maps():
    """Mona under `layers_0...` computes what it computes under `layers.0...`."""
    model, network, x = tiny_swin(), swin_lister(tiny_swin()), images("swin")
    dl.attach(model, METHODS["mona"])
    randomize_adapter(model)
    dl.attach(network, METHODS["mona"])
    anatomy = dl.describe(network)
    for path, parameter in network.named_parameters():
        if "delta" in path.split("."):
            parameter.data.copy_(model.get_parameter(anatomy.canonical(path)).data)
    maps = [y.permute(0, 2, 3, 1) for y in model.forward_intermediates(x, intermediates_only=True)]
    assert all(torch.equal(a, b) for a, b in zip(network(x), maps, strict=True))


def test_full_fine_tuning_of_features():
    network, x = swin_lister(tiny_swin()), images("swin")
    expected = network(x)
    dl.attach(network, FullConfig())
    randomize_adapter(network)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(network(x), expected, strict=True))
    dl.detach(network)
    assert all(torch.equal(a, b) for a, b in zip(network(x), expected, strict=True))


def test_class_row_shortcut_is_not_taken_where_features_are_asked_for():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, VPTConfig(num_tokens=3))
    assert model.forward_features(x).shape == (2, 17, 24)
    assert model.forward_intermediates(x)[0].shape == (2, 17, 24)
