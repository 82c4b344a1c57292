"""Several adapters on one model: switch, combine, disable, delete; heads, buffers, modes, devices and errors."""

import pytest
import torch
from models import METHODS, MODELS, PAIRS, images, randomize_adapter, tiny_resnet, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, FullConfig, LinearConfig, LoRAConfig, MonaConfig, VPTConfig

MONA = MonaConfig(bottleneck=4, dropout=0.0)


def two_adapters(family="vit", first="lora", second="mona"):
    """A model with adapters "a" (3 classes) and "b" (4 classes), and what each one alone and none outputs."""
    model, x = MODELS[family](), images(family)
    outputs = {"none": model(x)}
    for name, method, classes in (("a", first, 3), ("b", second, 4)):
        dl.attach(model, METHODS[method], name=name, num_classes=classes)
        randomize_adapter(model, seed=classes)
        outputs[name] = model(x).detach()
    return model, x, outputs


# ------------------------------------------------------------------ switch, disable, delete
@pytest.mark.parametrize(("family", "first"), PAIRS)
def test_switching_back_and_forth_is_bit_for_bit(family, first):
    model, x, outputs = two_adapters(family, first, "mona")
    assert dl.active_adapters(model) == ("b",)
    for name, classes in (("a", 3), ("b", 4), ("a", 3)):
        dl.set_adapter(model, name)
        assert dl.active_adapters(model) == (name,)
        assert torch.equal(model(x), outputs[name])
        assert model.num_classes == classes
    with dl.disable_adapter(model) as plain:
        assert plain is model
        assert dl.active_adapters(model) == ()
        torch.testing.assert_close(model(x), outputs["none"], atol=1e-5, rtol=1e-5)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), outputs["a"])
    dl.delete_adapter(model, "a")
    assert dl.active_adapters(model) == ()
    dl.set_adapter(model, "b")
    assert torch.equal(model(x), outputs["b"])
    dl.detach(model)
    assert torch.equal(model(x), outputs["none"])
    assert model.num_classes == 5


@pytest.mark.parametrize(
    ("first", "second"), [("vpt-shallow", "mona"), ("mona", "vpt-shallow"), ("lora", "mona"), ("vpt-deep", "mona")]
)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_second_adapter_computes_what_it_computes_alone(family, first, second):
    """Whatever blocks the first one had touched, and in whichever order."""
    model, x, outputs = two_adapters(family, first, second)
    alone = MODELS[family]()
    dl.attach(alone, METHODS[second], name="b", num_classes=4)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(names[name])
    torch.testing.assert_close(outputs["b"], alone(x), atol=1e-5, rtol=1e-5)
    both = dl.describe(model)
    assert [block.path for block in both.blocks()] == [block.path for block in dl.describe(alone).blocks()]


@pytest.mark.parametrize("family", ["convnext", "resnet"])
def test_adapters_do_not_change_what_is_found(family):
    """The fallback describes an adapted network as it describes the plain one."""
    model = MODELS[family]()
    before = [(block.path, block.width, type(block.tower.layout)) for block in dl.describe(model).blocks()]
    dl.attach(model, MonaConfig(bottleneck=8))
    dl.attach(model, BitFitConfig(), name="b")
    assert [(block.path, block.width, type(block.tower.layout)) for block in dl.describe(model).blocks()] == before


def test_only_the_active_adapter_learns():
    model, x, _ = two_adapters()
    dl.set_adapter(model, "a")
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        expected = "adapter_a" in name or name.startswith("head.")
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
    assert model.head.out_features == 3
    assert dl.count_parameters(model).head == 24 * 3 + 3


def test_a_failing_context_restores_the_adapter():
    model, x, outputs = two_adapters()
    with pytest.raises(KeyError), dl.disable_adapter(model):
        raise KeyError("stop")
    assert torch.equal(model(x), outputs["b"])


# ------------------------------------------------------------------ together
def test_two_active_adapters_act_together():
    model, x, _ = two_adapters("vit", "vpt-deep", "lora")
    dl.set_adapter(model, ["a", "b"])
    assert dl.active_adapters(model) == ("a", "b")
    both = model(x)
    assert both.shape == (2, 4)  # the head is the last one's
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter_a" in name:
                parameter.zero_()
    assert (model(x) - both).abs().max() > 1e-3
    dl.set_adapter(model, ["b", "a", "b"])
    assert dl.active_adapters(model) == ("b", "a")
    assert model(x).shape == (2, 3)


def test_stream_modules_chain_in_the_order_of_the_adapters():
    model = tiny_vit().double()
    for name in ("a", "b"):
        dl.attach(model, MONA, name=name)
        randomize_adapter(model, seed=ord(name))
    dl.set_adapter(model, ("a", "b"))
    slots = model.blocks[0].delta
    first, second = (slots._modules["attention_stream"][f"adapter_{name}"].mona for name in ("a", "b"))
    assert slots.live("attention.stream") == [first, second]
    dl.set_adapter(model, ("b", "a"))
    assert slots.live("attention.stream") == [second, first]
    feature_map = torch.randn(1, 4, 4, 24).double()
    stream = torch.cat([torch.zeros(1, 1, 24), feature_map.flatten(1, 2)], 1)
    model(images("vit").double())
    found = slots.chain("attention.stream", stream, slots.layout)[:, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(found, first(second(feature_map)), atol=1e-12, rtol=0)


def test_several_methods_make_one_adapter():
    model, x = tiny_vit(), images("vit")
    plain = model(x)
    dl.attach(model, [MONA, BitFitConfig(), LoRAConfig(r=2)])
    counts = [
        dl.count_parameters(dl.attach(tiny_vit(), config)).adapter for config in (MONA, BitFitConfig(), LoRAConfig(r=2))
    ]
    assert dl.count_parameters(model).adapter == sum(counts)
    randomize_adapter(model)
    kinds = {row.kind for row in dl.parameter_table(model)}
    assert kinds == {"inserted", "unfrozen", "head"}
    assert (model(x) - plain).abs().max() > 1e-3
    dl.detach(model)
    assert torch.equal(model(x), plain)


def test_the_same_method_twice_in_one_adapter():
    model, x = tiny_vit(), images("vit")
    dl.attach(model, [VPTConfig(num_tokens=2), VPTConfig(num_tokens=3)])
    assert [m.embedding.shape[0] for m in model.blocks[0].delta.live("attention.prompts")] == [2, 3]
    model(x).sum().backward()
    assert sum(p.numel() for n, p in model.named_parameters() if "delta" in n) == 5 * 24 * 3


# ------------------------------------------------------------------ heads, buffers, modes
def test_class_counts_and_fresh_heads():
    model = tiny_swin()
    original = model.head.fc
    dl.attach(model, MONA, name="a", num_classes=3)
    dl.attach(model, MONA, name="b")  # no number: a copy of the model's own head, not of adapter a's
    assert model.head.fc.out_features == model.num_classes == 5
    assert torch.equal(model.head.fc.weight, original.weight)
    assert model.head.fc is not original
    dl.set_adapter(model, "a")
    assert model.head.fc.out_features == model.num_classes == 3
    assert model.get_classifier() is model.head.fc
    dl.detach(model)
    assert model.head.fc is original
    assert model.num_classes == 5


def test_running_statistics_belong_to_their_adapter():
    model, x = tiny_resnet(), images("resnet", batch=4)
    pristine = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = {}
    for name, factor in (("a", 1.0), ("b", 3.0)):
        dl.attach(model, FullConfig(), name=name)
        model.train()
        for _ in range(3):
            model(factor * x)
        outputs[name] = (model.eval()(x).detach(), {n: b.clone() for n, b in model.named_buffers()})
        assert int(model.bn1.num_batches_tracked) == 3
    for name in ("a", "b", "a"):
        dl.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name][0])
        assert all(torch.equal(b, outputs[name][1][n]) for n, b in model.named_buffers())
    dl.detach(model)
    assert all(torch.equal(b, pristine[n]) for n, b in model.named_buffers())
    assert not torch.equal(outputs["a"][1]["bn1.running_mean"], outputs["b"][1]["bn1.running_mean"])


def test_running_statistics_survive_a_cast():
    """A cast gives modules new buffer objects; what they gather afterwards still belongs to the active adapter."""
    model, x = tiny_resnet(), images("resnet", batch=4).double()
    dl.attach(model, FullConfig(), name="a")
    dl.attach(model, LinearConfig(), name="b")
    dl.set_adapter(model, "a")
    model.double().train()
    for _ in range(3):
        model(x)
    output, statistics = model.eval()(x), {n: b.clone() for n, b in model.named_buffers()}
    dl.set_adapter(model, "b")
    assert int(model.bn1.num_batches_tracked) == 0
    dl.set_adapter(model, "a")
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("config", [LinearConfig(), MONA, [MONA, LinearConfig()]])
def test_frozen_batch_norm_never_moves(config):
    model, x = tiny_resnet(), images("resnet")
    pristine = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dl.attach(model, config)
    model.train()
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model(x)
    assert all(torch.equal(b, pristine[n]) for n, b in model.named_buffers() if "delta" not in n)


def test_an_adapters_own_batch_norm_learns():
    model, x = tiny_swin(), images("swin")
    dl.attach(model, MonaConfig(bottleneck=4, norm="batch"))
    (mona,) = model.layers[0].blocks[0].delta.live("attention.stream")
    model.train()(x)
    assert mona.norm.training
    assert int(mona.norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("config", "active"),
    [
        (MONA, True),
        (FullConfig(), True),
        (LoRAConfig(r=2), False),
        (VPTConfig(num_tokens=2), False),
        (LinearConfig(), False),
    ],
)
def test_frozen_mode_decides_about_the_backbones_dropout(config, active):
    model, x = tiny_vit(proj_drop_rate=0.5, drop_path_rate=0.5, drop_rate=0.5), images("vit")
    dl.attach(model, config)
    model.train()
    assert model.training
    body = [
        m
        for n, m in model.named_modules()
        if n.startswith("blocks.") and type(m).__name__ in ("Dropout", "DropPath") and "delta" not in n
    ]
    assert {m.training for m in body} == {active}
    assert model.head.training
    with torch.no_grad():
        features = [model.forward_features(x) for _ in range(2)]
    assert torch.equal(*features) != active
    dl.set_adapter(model, ())
    assert not any(m.training for m in body)
    dl.set_adapter(model, "default")
    assert {m.training for m in body} == {active}
    assert not any(m.training for m in model.eval().modules())
    dl.detach(model.train())
    assert all(m.training for m in model.modules())


def test_an_adapters_dropout_is_active_where_the_backbones_is_not():
    model, x = tiny_vit(drop_path_rate=0.5), images("vit")
    dl.attach(model, LoRAConfig(r=2, dropout=0.5))
    randomize_adapter(model)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


# ------------------------------------------------------------------ moved while inactive
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_what_is_inactive_follows_the_model(family):
    model, x = MODELS[family](), images(family)
    plain = model(x)
    outputs = {}
    for name, config in (("full", FullConfig()), ("mona", MONA), ("bias", BitFitConfig())):
        dl.attach(model, config, name=name, num_classes=4)
        randomize_adapter(model)
        outputs[name] = model(x).detach()
    model.double()
    for name, expected in outputs.items():
        dl.set_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float64}
        torch.testing.assert_close(model(x.double()).float(), expected, atol=1e-4, rtol=1e-4)
    dl.detach(model)
    torch.testing.assert_close(model(x.double()).float(), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("family", MODELS)
def test_what_is_inactive_follows_to_another_device(family):
    model, x = MODELS[family](), images(family).cuda()
    for name, config in (("full", FullConfig()), ("mona", MONA), ("bias", BitFitConfig())):
        dl.attach(model, config, name=name, num_classes=4)
    model.cuda()
    for name in ("full", "mona", "bias"):
        dl.set_adapter(model, name)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
        model(x).sum().backward()
    dl.detach(model)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
