"""Which layers peft's tuners wrap, and several adapters on one model."""

import peft
import pytest
import torch
from models import MODELS, randomize_adapter, tiny_convnext, tiny_unread
from peft_tuners import X, assert_unchanged, build, everything_about, loha, method_of, wrapped_layers
from torch import nn

import deltalens as dl
from deltalens.lifecycle.count import parameter_table

# ------------------------------------------------------------------ which layers


def test_default_targets():
    vit = dl.attach(build("vit"), dl.make_config("peft/loha", r=2))
    assert wrapped_layers(vit) == [f"blocks.{i}.attn.qkv" for i in range(3)]
    swin = dl.attach(build("swin"), dl.make_config("peft/ia3"))
    assert wrapped_layers(swin) == [
        f"layers.{i}.blocks.{j}.{layer}" for i in (0, 1) for j in (0, 1) for layer in ("attn.qkv", "mlp.fc2")
    ]
    assert swin.layers[0].blocks[0].mlp.fc2.is_feedforward
    assert not swin.layers[0].blocks[0].attn.qkv.is_feedforward
    convnext = dl.attach(tiny_convnext(), dl.make_config("peft/loha", r=2))
    assert len(wrapped_layers(convnext)) == 10
    assert {name.rpartition(".")[2] for name in wrapped_layers(convnext)} == {"fc1", "fc2"}
    with pytest.raises(ValueError, match="blocks of ResNet name no linear parts: give target_modules"):
        dl.attach(MODELS["resnet"](), dl.make_config("peft/loha"))


def test_targets_by_ending_expression_and_wildcard():
    def targets(**settings):
        return wrapped_layers(dl.attach(build("vit"), loha(**settings)))

    assert targets(target_modules=["attn.proj"]) == [f"blocks.{i}.attn.proj" for i in range(3)]
    assert targets(target_modules=r"blocks\.[02]\.mlp\.fc\d") == [
        f"blocks.{i}.mlp.fc{j}" for i in (0, 2) for j in (1, 2)
    ]
    assert targets(target_modules=["fc1"], layers_to_transform=[1], layers_pattern="blocks") == ["blocks.1.mlp.fc1"]
    assert targets(target_modules=["qkv", "fc1"], exclude_modules=["fc1"]) == [f"blocks.{i}.attn.qkv" for i in range(3)]
    assert targets(target_modules="all-linear") == [
        f"blocks.{i}.{layer}" for i in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


class WithMultiheadAttention(nn.Module):
    pretrained_cfg = {"input_size": (3, 8, 8)}

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (lambda: build("vit"), ["proj"], "patch_embed.proj is the patch embedding"),
        (lambda: build("vit"), ["qkv", "head"], "head belongs to the head"),
        (lambda: build("vit"), ["attn"], "blocks.0.attn is a Attention; peft/loha changes nn.Linear layers only"),
        (lambda: build("vit"), ["norm1"], "blocks.0.norm1 is a LayerNorm"),
        (lambda: build("vit"), ["query"], "matches no layer of VisionTransformer"),
        (WithMultiheadAttention, ["out_proj"], "never called: its parent MultiheadAttention reads the weight itself"),
        (tiny_unread, ["qkv"], "never called: its parent WindowAttention reads the weight itself"),
    ],
)
def test_unfit_targets_are_refused(model, targets, message):
    network = model()
    before = everything_about(network)
    with pytest.raises((ValueError, TypeError), match=message):
        dl.attach(network, loha(*targets), blocks=r"blocks\.\d+" if model is WithMultiheadAttention else None)
    assert_unchanged(network, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_backbone_are_refused(init):
    model = build("vit")
    before, plain = everything_about(model), model(X["vit"])
    with pytest.raises(ValueError, match="changes the frozen weights when it starts"):
        dl.attach(model, dl.from_peft(peft.LoraConfig(r=4, init_lora_weights=init)))
    assert_unchanged(model, before)
    assert torch.equal(model(X["vit"]), plain)


def test_layers_with_a_weight_method_are_refused_both_ways():
    lora = dl.LoRAConfig(r=2, parts=("q", "v"))
    model = dl.attach(build("vit"), lora, "a")
    with pytest.raises(ValueError, match=r"peft/loha cannot change blocks.0.attn.qkv, which lora of the adapter 'a'"):
        dl.attach(model, loha(), "b")
    assert list(dl.active_adapters(model)) == ["a"]
    dl.attach(model, loha("fc1"), "b")  # other layers are fine
    dl.delete_adapter(model, "a")
    dl.attach(model, loha("qkv"), "c")  # and so are these once LoRA is gone
    with pytest.raises(ValueError, match=r"lora cannot change blocks.0.attn.qkv, which peft/loha of the adapter 'c'"):
        dl.attach(model, lora, "d")
    assert dl.active_adapters(model) == ("c",)
    dl.delete_adapter(model, "c")
    dl.attach(model, lora, "d")
    for methods in ([lora, loha()], [loha(), lora]):
        with pytest.raises(ValueError, match=r"peft/loha cannot change blocks.0.attn.qkv, which lora changes already"):
            dl.attach(build("vit"), methods)
    with pytest.raises(ValueError, match=r"peft/lokr cannot change .*qkv, which peft/loha changes already"):
        dl.attach(build("vit"), [loha(), dl.make_config("peft/lokr")])


# ------------------------------------------------------------------ several adapters
@pytest.mark.parametrize(
    "other", [dl.MonaConfig(bottleneck=6, dropout=0.0), dl.VPTConfig(num_tokens=3), dl.BitFitConfig()]
)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_with_another_method_side_by_side(family, other, tmp_path):
    model, x = build(family), X[family]
    plain, outputs = model(x), {}
    for name, method in (("peft", loha("qkv", "fc1")), ("other", other), ("more", dl.make_config("peft/lokr", r=2))):
        randomize_adapter(dl.attach(model, method, name, num_classes=4), seed=len(name))
        outputs[name] = model(x)
    for name in ("peft", "other", "more", "peft", "other"):
        dl.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
    dl.set_adapter(model, ("peft", "other"))
    together = model(x)
    assert min((together - outputs[name]).abs().max() for name in outputs) > 1e-3
    alone = dl.from_pretrained(save(model, "peft", tmp_path / "peft"), build(family))
    dl.load_adapter(alone, save(model, "other", tmp_path / "other"), "other")
    dl.set_adapter(alone, ("default", "other"))
    assert torch.equal(alone(x), together)
    dl.set_adapter(alone, "default")
    assert torch.equal(alone(x), outputs["peft"])
    dl.delete_adapter(model, "peft")
    dl.set_adapter(model, "more")
    assert torch.equal(model(x), outputs["more"])
    assert torch.equal(dl.detach(model)(x), plain)


def save(model, name, folder):
    dl.save_pretrained(model, folder, name)
    return folder


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_methods_in_one_adapter(family, tmp_path):
    model, x = build(family), X[family]
    before, plain = everything_about(model), model(x)
    methods = [
        dl.MonaConfig(bottleneck=6, dropout=0.0),
        loha("qkv"),
        dl.BitFitConfig(),
        method_of("vera", target_modules=["fc1"]),
    ]
    dl.attach(model, methods)
    randomize_adapter(model)
    kinds = {row.kind for row in parameter_table(model)}
    assert kinds == {"inserted", "unfrozen", "head"}
    adapted = model(x)
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, build(family))
    assert torch.equal(again(x), adapted)
    assert [m.name for m in again.__dict__["_deltalens"].adapters["default"].configs] == [m.name for m in methods]
    torch.testing.assert_close(dl.merge_and_unload(again)(x), adapted, atol=1e-4, rtol=1e-4)
    dl.detach(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), plain)


def test_two_adapters_that_wrap_one_layer_do_not_act_together():
    model, x = build("vit"), X["vit"]
    randomize_adapter(dl.attach(model, loha(), "a"))
    randomize_adapter(dl.attach(model, dl.make_config("peft/ia3"), "b"), seed=2)
    output = model(x)
    with pytest.raises(ValueError, match=r"'a' and 'b' both wrap blocks.0.attn.qkv: they cannot act together"):
        dl.set_adapter(model, ("a", "b"))
    assert dl.active_adapters(model) == ("b",)
    assert torch.equal(model(x), output)


def test_a_failed_attach_leaves_the_active_wrappers():
    model, x = build("vit"), X["vit"]
    output = randomize_adapter(dl.attach(model, loha()))(x)
    with pytest.raises(ValueError, match="matches no layer"):
        dl.attach(model, loha("query"), "b")
    assert torch.equal(model(x), output)
    assert wrapped_layers(model) == [f"blocks.{i}.attn.qkv" for i in range(3)]
