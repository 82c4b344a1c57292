"""nn.MultiheadAttention with adapters in q, k, v of its fused projection and in out_proj, however it is called."""

import json

import pytest
import torch
from library_models import WithHead, tiny_oc_custom, tiny_oc_visual, tiny_tv_convnext, tiny_tv_vit
from models import images, randomize, randomize_adapter, tiny_vit
from safetensors.torch import load_file
from torch import nn

import deltalens as dl
from deltalens.backbones.multihead import visible
from deltalens.sites.swap import Swapped

ALL = ("q", "k", "v", "proj")


def double_images():
    return images("vit").double()


def adapted_and_merged(*methods):
    """One attention with adapters in its weights, and an nn.MultiheadAttention of PyTorch with the merged weights."""
    model = tiny_tv_vit().double()
    randomize_adapter(dl.attach(model, list(methods))).eval()
    attn = model.encoder.layers[0].self_attention
    assert isinstance(attn, Swapped)
    plain = nn.MultiheadAttention(24, 4, batch_first=True).double().eval()
    changed = {}
    for layer, name in ((attn, "in_proj"), (attn.out_proj, "out_proj.")):
        bias, inputs = torch.zeros(1, 24).double(), torch.eye(24).double()
        rows = layer(torch.cat([bias, inputs])) if layer is attn.out_proj else whole_projection(attn, bias, inputs)
        changed |= {f"{name}{'_' * (layer is attn)}weight": (rows[1:] - rows[:1]).T}
        changed |= {f"{name}{'_' * (layer is attn)}bias": rows[0]}
    plain.load_state_dict({key: value.detach() for key, value in changed.items()})
    return attn, plain


def whole_projection(attn, *x):
    from deltalens.sites.weights import linear_rows

    return linear_rows(attn, torch.cat(x), 0, 72)


CAUSAL = torch.full((5, 5), float("-inf")).triu(1).double()
CALLS = {
    "self": {},
    "weights": {"need_weights": True},
    "weights of heads": {"need_weights": True, "average_attn_weights": False},
    "added mask": {"attn_mask": CAUSAL},
    "added mask, weights": {"attn_mask": CAUSAL, "need_weights": True},
    "boolean mask": {"attn_mask": CAUSAL.bool()},
    "mask of each head": {"attn_mask": torch.randn(8, 5, 5).double()},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "padding and mask": {
        "key_padding_mask": torch.tensor([[False, True] * 2 + [False]] * 2),
        "attn_mask": CAUSAL.bool(),
    },
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
}


@pytest.mark.parametrize("methods", ["lora", "ssf"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_that_of_the_merged_module(call, methods):
    config = {"lora": dl.LoRAConfig(r=2, parts=ALL), "ssf": dl.SSFConfig()}[methods]
    attn, plain = adapted_and_merged(config)
    x, options = torch.randn(2, 5, 24).double(), {"need_weights": False, **CALLS[call]}
    found, expected = attn(x, x, x, **options), plain(x, x, x, **options)
    torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=1e-10)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], atol=1e-10, rtol=1e-10)


def test_other_keys_other_order_no_batch():
    attn, plain = adapted_and_merged(dl.LoRAConfig(r=2, parts=ALL))
    q, k, v = torch.randn(2, 4, 24).double(), torch.randn(2, 6, 24).double(), torch.randn(2, 6, 24).double()
    torch.testing.assert_close(attn(q, k, v)[0], plain(q, k, v)[0], atol=1e-10, rtol=1e-10)
    for found, expected in zip(attn(q[0], k[0], v[0]), plain(q[0], k[0], v[0]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    attn.batch_first = plain.batch_first = False
    torch.testing.assert_close(attn(q, q, q)[0], plain(q, q, q)[0], atol=1e-10, rtol=1e-10)


def test_masks_are_turned_around():
    hidden = torch.tensor([[False, True], [False, False]])
    assert torch.equal(visible(hidden, 3), ~hidden)
    assert visible(torch.zeros(6, 2, 2), 3).shape == (2, 3, 2, 2)


# ------------------------------------------------------------------ attach, train, files
MODELS = {
    "torchvision": (tiny_tv_vit, r".*self_attention\.out_proj", "encoder.layers.encoder_layer_0.self_attention"),
    "open_clip": (lambda: WithHead(tiny_oc_visual()), ("out_proj",), "visual.transformer.resblocks.0.attn"),
    "open_clip's own": (lambda: WithHead(tiny_oc_custom()), ("out_proj",), "visual.transformer.resblocks.0.attn"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_lora_on_out_proj_by_name_acts(kind):
    """peft's does nothing here on the first two, and says nothing (huggingface/peft#761)."""
    make, targets, _ = MODELS[kind]
    model, x = make().double(), double_images()
    plain = model(x).detach()
    dl.attach(model, dl.LoRAConfig(r=2, target_modules=targets))
    randomize_adapter(model)
    head = model.state_dict()
    for name in ("heads.head", "head"):
        if f"{name}.weight" in head:
            model.get_submodule(name).load_state_dict(make().get_submodule(name).state_dict())
    output = model(x)
    assert (output - plain).abs().max() > 1e-3
    output.sum().backward()
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(lora) == 6
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.values())
    merged = dl.merge_and_unload(model.eval())
    torch.testing.assert_close(merged(x), output.detach(), atol=1e-10, rtol=1e-10)
    assert not any(isinstance(module, Swapped) for module in merged.modules())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("part", ALL)
def test_every_part_is_its_rows(part, kind):
    """A change in one part alone is a change of those rows of the weight, and of nothing else."""
    make, _, path = MODELS[kind]
    model, x = make().double(), double_images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dl.attach(model, dl.LoRAConfig(r=2, parts=(part,)))
    randomize_adapter(model)
    expected = model.eval()(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected, atol=1e-10, rtol=1e-10)
    after = model.state_dict()
    name = f"{path}.out_proj.weight" if part == "proj" else f"{path}.in_proj_weight"
    moved = (after[name] - before[name]).abs().amax(1) > 1e-6
    rows = torch.arange(len(moved)) // 24 == (0 if part == "proj" else "qkv".index(part))
    assert torch.equal(moved, rows)
    other = f"{path}.in_proj_weight" if part == "proj" else f"{path}.out_proj.weight"
    assert torch.equal(after[other], before[other])


def test_switched_off_it_is_the_library_s_own():
    model, x = tiny_tv_vit(), images("vit")
    model.encoder.register_forward_hook(lambda *_: None)  # no class row only
    with torch.no_grad():
        expected = model(x)
        randomize_adapter(dl.attach(model, dl.LoRAConfig(r=2, parts=ALL))).eval()
        assert not torch.equal(model(x), expected)
        with dl.disable_adapter(model):
            assert torch.equal(model(x), expected)


def test_bitfit_trains_the_biases_of_the_fused_projection():
    model, x = tiny_tv_vit(), images("vit")
    dl.attach(model, dl.BitFitConfig())
    model(x).sum().backward()
    attn = model.encoder.layers[0].self_attention
    assert attn.in_proj_bias.grad.abs().max() > 0
    assert attn.out_proj.bias.grad.abs().max() > 0
    assert attn.in_proj_weight.grad is None


def test_ssf_scales_both_projections_and_passes_over_unknown_ones():
    model = dl.attach(tiny_tv_vit(), dl.SSFConfig())
    attn = model.encoder.layers[0].self_attention
    assert attn.delta.all.adapter_default.ssf.scale.shape == (72,)
    assert attn.out_proj.delta.all.adapter_default.ssf.scale.shape == (24,)
    model = dl.attach(Unknown(), dl.SSFConfig())
    scaled = {name.partition(".delta")[0] for name, _ in model.named_parameters() if ".delta." in name}
    assert not any(".attn" in name for name in scaled)
    assert "blocks.0.fc" in scaled


class UnknownBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.attn(x, x, x)[0])


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(UnknownBlock(), UnknownBlock())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("out_proj", "blocks.0.attn.out_proj is never called: its parent MultiheadAttention reads the weight itself"),
        ("attn", "blocks.0.attn is never called"),
    ],
)
def test_attention_in_blocks_of_no_family_is_refused(target, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        dl.attach(Unknown(), dl.LoRAConfig(r=2, target_modules=(target,)))


def test_the_fused_projection_by_name_is_one_layer():
    """One A and one B for q, k and v together; out_proj is another layer."""
    model, x = tiny_tv_vit().double(), double_images()
    dl.attach(model, dl.LoRAConfig(r=2, target_modules=("self_attention",)))
    randomize_adapter(model).eval()
    lora = model.encoder.layers[0].self_attention.delta.all.adapter_default.lora
    assert (lora.lora_A.weight.shape, lora.lora_B.weight.shape) == ((2, 24), (72, 2))
    assert "delta" not in model.encoder.layers[0].self_attention.out_proj._modules
    expected = model(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
def test_peft_s_lora_of_an_attention_is_refused(tmp_path):
    """peft's LoRA on open_clip's towers, target_modules=["attn"]. peft 0.21 adds the change of out_proj twice, with the
    adapter in place and when merging; when this test fails at the factor of 2, such folders can be read."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(tiny_oc_visual(), LoraConfig(r=2, lora_alpha=6, target_modules=["attn"]))
    randomize_adapter(theirs).eval().save_pretrained(tmp_path)
    tensors, merged = load_file(tmp_path / "adapter_model.safetensors"), tiny_oc_visual()
    with torch.no_grad():
        for i, block in enumerate(merged.transformer.resblocks):
            place = f"base_model.model.transformer.resblocks.{i}.attn"
            for weight, layer, factor in (
                (block.attn.in_proj_weight, place, 1),
                (block.attn.out_proj.weight, f"{place}.base_layer.out_proj", 2),
            ):
                pair = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
                weight += factor * 3 * pair
        torch.testing.assert_close(theirs(images("vit")), merged(images("vit")), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="adds the change of out_proj twice"):
        dl.load_adapter(tiny_oc_visual(), tmp_path)


def test_files_hold_the_parts_and_are_not_peft_s(tmp_path):
    """peft has one LoRA for all of in_proj and one for out_proj, and cannot tell q from v. It refuses the folder: there
    are no target_modules in it."""
    model = randomize_adapter(dl.attach(tiny_tv_vit(), dl.LoRAConfig(r=2, parts=("q", "proj", "fc1"))))
    dl.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    place = "encoder.layers.encoder_layer_1.self_attention"
    assert tensors[f"{place}.q.lora.lora_B.weight"].shape == (24, 2)
    assert tensors[f"{place}.out_proj.proj.lora.lora_B.weight"].shape == (24, 2)
    assert "target_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = dl.from_pretrained(tmp_path, tiny_tv_vit())
    with torch.no_grad():
        assert torch.equal(loaded(images("vit")), model.eval()(images("vit")))


@pytest.mark.slow
def test_peft_refuses_such_a_folder(tmp_path):
    from peft import PeftModel

    dl.save_pretrained(dl.attach(tiny_tv_vit(), dl.LoRAConfig(r=2)), tmp_path)
    with pytest.raises(ValueError, match="target_modules"):
        PeftModel.from_pretrained(tiny_tv_vit(), tmp_path)


def test_lora_on_the_mlp_alone_is_a_peft_file(tmp_path):
    dl.save_pretrained(dl.attach(tiny_tv_vit(), dl.LoRAConfig(r=2, parts=("fc1",))), tmp_path)
    assert (
        "encoder.layers.encoder_layer_0.mlp.0"
        in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )


@pytest.mark.slow
def test_peft_s_layers_on_out_proj_act():
    """The attention calls its layer once something sits in it, a wrapper of peft's as well."""
    model, x = tiny_tv_vit().double(), double_images()
    dl.attach(model, dl.make_config("peft/loha", r=2, target_modules=["out_proj"]))
    randomize_adapter(model)
    output = model(x)
    output.sum().backward()
    trained = [p for name, p in model.named_parameters() if "hada" in name]
    assert trained
    assert all(p.grad.abs().max() > 0 for p in trained)
    torch.testing.assert_close(dl.merge_and_unload(model.eval())(x), output.detach(), atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------ a first convolution that is changed twice
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("make", [tiny_tv_vit, tiny_tv_convnext, tiny_vit])
def test_ssf_and_image_channels_share_the_first_convolution(make, order):
    model, x = make().double(), double_images()
    methods = [dl.SSFConfig(), dl.VPTConfig(num_tokens=2, location="concat-channel", deep=False)]
    dl.attach(model, methods[::order])
    randomize_adapter(model).eval()
    stem = dl.describe(model).towers[0].stem
    held = dict(stem.module.delta.of("default"))
    ssf, channels = held["all.ssf"], held["stem_parallel.vpt"]
    plain = nn.Conv2d.forward(stem.module, x)
    expected = ssf(plain.movedim(1, -1)).movedim(-1, 1) + channels(x)
    torch.testing.assert_close(stem.module(x), expected, atol=1e-12, rtol=1e-12)
    output = model(x)
    torch.testing.assert_close(dl.merge_and_unload(model)(x), output, atol=1e-9, rtol=1e-9)


def test_merged_weights_leave_the_grid_s_recorder_in_place():
    """SSF in the patch embedding disappears; Mona still needs the grid of the next image."""
    model = tiny_oc_visual().double()
    wrapped = randomize(WithHead(model)).double()
    randomize_adapter(dl.attach(wrapped, [dl.SSFConfig(), dl.MonaConfig(bottleneck=3)])).eval()
    expected = wrapped(double_images())
    merged = dl.merge_and_unload(wrapped)
    merged.visual.transformer.resblocks[0].delta.layout.grid = None
    torch.testing.assert_close(merged(double_images()), expected, atol=1e-9, rtol=1e-9)
