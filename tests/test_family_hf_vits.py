"""transformers' ViT-like towers: prompts, formulas, recorded states, and the matrix of methods."""

import copy
import pickle

import pytest
import torch
from hf_models import tiny
from matrix import LABELS, ROWS, export, refusal, walk
from models import randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.sites.output import logits_of

transformers = pytest.importorskip("transformers", "5.0")

CLASSIFIERS = {
    "ViTForImageClassification": {},
    "DeiTForImageClassification": {},
    "Dinov2ForImageClassification": {},
    "Dinov2WithRegistersForImageClassification": {},
    "BeitForImageClassification": {},
    "CLIPForImageClassification": {},
    "SiglipForImageClassification": {},
}
BARE = ("DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel", "ViTModel")
NO_PATCHES = "VPT, patches of pixels"
REFUSED = {
    name: {NO_PATCHES} if name.startswith(("Dinov2", "Beit")) else {NO_PATCHES, "VPT, frame of pixels"}
    for name in CLASSIFIERS
}
SOME_ROWS = ("Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v", "Adapter, Houlsby", "SSF")


def images(batch=2, size=32, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def tokens_of(output):
    return output.logits if "logits" in output else output.last_hidden_state


def blocks_of(model):
    return [block.module for block in dl.describe(model).blocks()]


# ------------------------------------------------------------------ the matrix
@pytest.mark.parametrize("row", ROWS)
def test_rows_are_refused_by_name_or_fit(row):
    name = "ViTForImageClassification"
    message = refusal(lambda: tiny(name), row)
    assert (message is not None) == (row in REFUSED[name]), message
    assert message is None or "patch embedding" in message or "interpolate_pos_encoding" in message


@pytest.mark.parametrize("row", SOME_ROWS)
def test_walk(row, tmp_path):
    walk(lambda: tiny("ViTForImageClassification"), images(len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("row", ROWS)
def test_full_walk(name, row, tmp_path):
    message = refusal(lambda: tiny(name), row)
    assert (message is not None) == (row in REFUSED[name]), message
    if message is None:
        export(walk(lambda: tiny(name), images(len(LABELS)), row, tmp_path), images())


# ------------------------------------------------------------------ prompts
def with_real_prompts(model, prompts, prefix):
    """Hooks that put each block's prompts into its stream behind the prefix, and take them out again."""
    for block, tokens in zip(blocks_of(model), prompts, strict=True):
        count = len(tokens)

        def put_in(module, args, tokens=tokens):
            x = args[0]
            return (torch.cat([x[:, :prefix], tokens.expand(len(x), -1, -1), x[:, prefix:]], 1), *args[1:])

        def take_out(module, args, x, count=count):
            return torch.cat([x[:, :prefix], x[:, prefix + count :]], 1)

        def no_bias(module, args, bias, count=count):
            for axis in (-1, -2):
                shape = list(bias.shape)
                shape[axis] = count
                parts = bias[..., :prefix] if axis == -1 else bias[..., :prefix, :]
                rest = bias[..., prefix:] if axis == -1 else bias[..., prefix:, :]
                bias = torch.cat([parts, bias.new_zeros(shape), rest], axis)
            return bias

        block.register_forward_pre_hook(put_in)
        block.register_forward_hook(take_out)
        if getattr(block, "relative_position_bias", None) is not None:
            block.relative_position_bias.register_forward_hook(no_bias)
    return model


GATED = {"use_gated_mlp": True}
PROMPTED = [
    *[(name, implementation, {}) for name in CLASSIFIERS for implementation in ("sdpa", "eager")],
    ("DINOv3ViTModel", "sdpa", {}),
    ("DINOv3ViTModel", "eager", GATED),
    ("Dinov2ForImageClassification", "sdpa", {"use_swiglu_ffn": True}),
    ("ViTForImageClassification", "sdpa", {"qkv_bias": False}),
    ("BeitForImageClassification", "sdpa", {"use_relative_position_bias": False}),
]


@pytest.mark.parametrize(("name", "implementation", "settings"), PROMPTED)
def test_prompts_are_tokens_thrown_away(name, implementation, settings):
    model = tiny(name, **settings).double()
    model.set_attn_implementation(implementation)
    plain, x = copy.deepcopy(model), images(dtype=torch.float64)
    dl.attach(model, dl.VPTConfig(num_tokens=3))
    randomize_adapter(model)
    anatomy = dl.describe(model)
    own = [p for n, p in model.named_parameters() if n.endswith("vpt.embedding")]
    copies = [p.detach().clone().requires_grad_() for p in own]
    head = plain.get_submodule(anatomy.head) if anatomy.head else None
    if head is not None:
        head.load_state_dict(model.get_submodule(anatomy.head).state_dict())
    with_real_prompts(plain, copies, anatomy.towers[0].layout.prefix)
    expected, found = tokens_of(plain(x)), tokens_of(model(x))
    weights = torch.randn(expected.shape, dtype=torch.float64)
    exact = {"atol": 1e-10 if implementation == "sdpa" else 1e-5, "rtol": 0}  # eager takes its softmax in float32
    torch.testing.assert_close(found, expected, **exact)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert len(own) == 3
    for one, other in zip(own, copies, strict=True):
        assert one.grad.abs().max() > 1e-8
        torch.testing.assert_close(one.grad, other.grad, **exact)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BeitForImageClassification", "DINOv3ViTModel"])
def test_shallow_prompts_live_on_as_tokens(name):
    model = tiny(name).double()
    plain, x = copy.deepcopy(model), images(dtype=torch.float64)
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False))
    randomize_adapter(model)
    anatomy, prefix = dl.describe(model), dl.describe(model).towers[0].layout.prefix
    if anatomy.head:
        plain.get_submodule(anatomy.head).load_state_dict(model.get_submodule(anatomy.head).state_dict())
    tokens = next(p for n, p in model.named_parameters() if n.endswith("vpt.embedding")).detach()
    blocks = blocks_of(plain)

    def put_in(module, args):
        return (torch.cat([args[0][:, :prefix], tokens.expand(2, -1, -1), args[0][:, prefix:]], 1), *args[1:])

    def bias(module, args, b):
        full = b.new_zeros(1, b.shape[1], b.shape[2] + 3, b.shape[3] + 3)
        index = torch.tensor([*range(prefix), *range(prefix + 3, full.shape[2])])
        full[:, :, index[:, None], index] = b
        return full

    blocks[0].register_forward_pre_hook(put_in)
    for block in blocks:
        if getattr(block, "relative_position_bias", None) is not None:
            block.relative_position_bias.register_forward_hook(bias)
    blocks[-1].register_forward_hook(lambda m, a, y: torch.cat([y[:, :prefix], y[:, prefix + 3 :]], 1))
    torch.testing.assert_close(tokens_of(model(x)), tokens_of(plain(x)), atol=1e-10, rtol=0)


def test_prompts_see_past_a_mask():
    """A mask of the user's hides patches; prompts stay visible, whether they are tokens or keys and values."""
    for config in (dl.VPTConfig(num_tokens=3), dl.VPTConfig(num_tokens=3, deep=False)):
        found = {}
        for implementation in ("sdpa", "eager"):
            torch.manual_seed(0)
            model = tiny("ViTForImageClassification").double()
            model.set_attn_implementation(implementation)
            randomize_adapter(dl.attach(model, config))
            mask = torch.ones(2, 17, dtype=torch.long)
            mask[:, 9:] = 0
            x = images(dtype=torch.float64)
            hidden = x.clone()
            hidden[:, :, 16:] += 1  # what lies behind the mask
            found[implementation] = model(x, attention_mask=mask).logits
            torch.testing.assert_close(model(hidden, attention_mask=mask).logits, found[implementation])
            assert not torch.allclose(model(hidden).logits, model(x).logits)
        torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-5, rtol=0)  # as above


class _Hide(nn.Module):
    """A mask module: nobody sees the last patch."""

    def forward(self, mask, x, layout):
        visible = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)
        visible[..., -1] = False
        return visible if mask is None else mask & visible


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_mask_slot(implementation):
    model = tiny("ViTForImageClassification").double()
    model.set_attn_implementation(implementation)
    plain = copy.deepcopy(model)
    dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=4))
    for block in blocks_of(model):
        block.delta.put("attention.mask", "default", "hide", _Hide())
    visible = torch.ones(2, 17, dtype=torch.long)
    visible[:, -1] = 0
    x = images(dtype=torch.float64)
    for adapter in (m for n, m in model.named_modules() if n.endswith("adapter") and "inner" in n):
        nn.init.zeros_(adapter.up.weight if hasattr(adapter, "up") else next(adapter.parameters()))
    with torch.no_grad():
        expected = plain(x, attention_mask=visible, output_hidden_states=True).hidden_states[1][:, :-1]
        found = model(x, output_hidden_states=True).hidden_states[1][:, :-1]
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ formulas
NAMES = {  # norm and body of each branch, as the library's forward has them
    "ViTForImageClassification": lambda b: (b.layernorm_before, b.attention, 1, b.layernorm_after, b.mlp, 1),
    "DeiTForImageClassification": lambda b: (b.layernorm_before, b.attention, 1, b.layernorm_after, b.mlp, 1),
    "Dinov2ForImageClassification": lambda b: (
        *(b.norm1, b.attention, b.layer_scale1.lambda1),
        *(b.norm2, b.mlp, b.layer_scale2.lambda1),
    ),
    "BeitForImageClassification": lambda b: (
        *(b.layernorm_before, b.attention, b.lambda_1),
        *(b.layernorm_after, b.mlp, b.lambda_2),
    ),
    "CLIPForImageClassification": lambda b: (b.layer_norm1, b.self_attn, 1, b.layer_norm2, b.mlp, 1),
    "SiglipForImageClassification": lambda b: (b.layer_norm1, b.self_attn, 1, b.layer_norm2, b.mlp, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_block_follows_the_equation(name):
    """pre, inner, parallel and stream modules, against the branches written out."""
    model = tiny(name).double()
    methods = [
        dl.RepAdapterConfig(bottleneck=4),
        dl.AdapterConfig.houlsby(bottleneck=4),
        dl.AdaptFormerConfig(bottleneck=4),
        dl.MonaConfig(bottleneck=4),
    ]
    randomize_adapter(dl.attach(model, methods)).eval()
    block, x = blocks_of(model)[1], torch.randn(2, 17, 24, dtype=torch.float64)
    anatomy = dl.describe(model)
    tower = anatomy.towers[0]
    x = x[:, : tower.layout.prefix + 16] if tower.layout.prefix < 2 else torch.cat([x[:, :1], x], 1)
    block.delta.layout.record(4, 4)
    kwargs = {"resolution": (32, 32)} if name.startswith("Beit") else {}
    found = block(x, None, **kwargs)
    slots, layout = block.delta, block.delta.layout
    norm1, attention, scale1, norm2, mlp, scale2 = NAMES[name](block)
    mask = block.relative_position_bias((4, 4)) if name.startswith("Beit") else None
    y = x
    for branch, norm, body, scale in (
        ("attention", norm1, lambda n: attention(n, mask)[0], scale1),
        ("mlp", norm2, mlp, scale2),
    ):
        n = norm(y)
        u = body(slots.chain(f"{branch}.pre", n, layout)) * scale
        for module in slots.live(f"{branch}.inner"):
            u = module(u)
        delta, _ = slots.parallel(f"{branch}.parallel", y, n, layout)
        y = slots.chain(f"{branch}.stream", y + u + (0 if delta is None else delta), layout)
    torch.testing.assert_close(found, y, atol=1e-10, rtol=0)
    assert slots.live("attention.inner")
    assert slots.live("mlp.parallel")
    assert slots.live("mlp.stream")


@pytest.mark.parametrize("name", [*CLASSIFIERS, "DINOv3ViTModel"])
def test_adapters_that_add_zero_change_nothing(name):
    model = tiny(name)
    x = images()
    with torch.no_grad():
        expected = tokens_of(model(x))
        dl.attach(model, [dl.AdapterConfig(bottleneck=4, parallel=True), dl.LoRAConfig(r=2, parts=("q", "v"))])
        for n, p in model.named_parameters():
            if n.endswith(("up.weight", "up.bias", "lora_B.weight")):
                p.zero_()
        assert torch.equal(tokens_of(model(x)), expected)
        dl.detach(model)
        assert torch.equal(tokens_of(model(x)), expected)


def test_parts_and_gated_mlps():
    found = {
        name: set(blocks[0].parts)
        for name, settings in (
            ("ViTModel", {}),
            ("DINOv3ViTModel", {}),
            ("Dinov2Model", {"use_swiglu_ffn": True}),
        )
        if (blocks := dl.describe(tiny(name, **settings)).blocks())
    }
    plain = {"q", "k", "v", "proj", "fc1", "fc2"}
    assert found["ViTModel"] == found["DINOv3ViTModel"] == plain
    assert found["Dinov2Model"] == plain - {"fc1"} | {"fc1_g", "fc1_x"}


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2ForImageClassification", "DINOv3ViTModel"])
def test_merged_is_the_same(name):
    gated = {"use_swiglu_ffn": True} if name.startswith("Dinov2") else {}
    for config in (dl.RepAdapterConfig(bottleneck=4), dl.LoRAConfig(r=2, parts=("q", "k", "proj", "fc2"))):
        model = tiny(name, **gated).double()
        randomize_adapter(dl.attach(model, config)).eval()
        expected = tokens_of(model(images(dtype=torch.float64)))
        merged = dl.merge_and_unload(model)
        torch.testing.assert_close(tokens_of(merged(images(dtype=torch.float64))), expected, atol=1e-9, rtol=0)
        assert all(type(m).__mro__[1].__name__ != "Swapped" for m in merged.modules())
    model = tiny(name, **gated).double()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3))).eval()
    expected = tokens_of(model(images(dtype=torch.float64)))
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(tokens_of(merged(images(dtype=torch.float64))), expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------ what the library's options do
def shapes(output):
    return {
        key: [tuple(x.shape) for x in value] if isinstance(value, (tuple, list)) else tuple(value.shape)
        for key, value in output.items()
        if value is not None
    }


RECORDING = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2Backbone",
    "DINOv3ViTBackbone",
    "BeitBackbone",
    "CLIPVisionModel",
    "SiglipVisionModel",
]


@pytest.mark.parametrize("name", RECORDING)
@pytest.mark.parametrize("deep", [True, False])
def test_recorded_states_hold_the_backbones_own_tokens(name, deep):
    model = tiny(name)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = shapes(model(images(), **options))
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=deep))
    output = model(images(), **options)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert shapes(output) == expected
    flat = model(images(), return_dict=False, **options)
    assert isinstance(flat, tuple)
    values = [value for value in output.values() if value is not None]
    for one, other in zip(flat, values, strict=True):
        for a, b in zip(*((one, other) if isinstance(one, tuple) else ((one,), (other,))), strict=True):
            assert torch.equal(a, b)
    dl.detach(model)
    assert shapes(model(images(), **options)) == expected


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel"])
def test_other_image_sizes_move_the_grid(name):
    model = tiny(name)
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    x = torch.randn(2, 3, 48, 24)
    output = model(x, interpolate_pos_encoding=True, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (2, 1 + 6 * 3, 24)
    assert dl.describe(model).towers[0].embed.module.__dict__["delta_layout"].grid == (6, 3)
    with pytest.raises(ValueError, match="doesn't match"):
        model(x)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "BeitModel"])
def test_masked_patches_pass(name):
    model = tiny(name, use_mask_token=True) if name != "ViTModel" else None
    if model is None:
        model = transformers.ViTForMaskedImageModeling(tiny(name).config).eval()
        model.config.encoder_stride = model.config.patch_size
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    if name == "ViTModel":
        assert model.vit(images(), bool_masked_pos=mask).last_hidden_state.shape == (2, 17, 24)
    else:
        found = model(images(), bool_masked_pos=mask).last_hidden_state
        assert found.shape == (2, 17, 24)
        assert not torch.allclose(found, model(images()).last_hidden_state)


@pytest.mark.parametrize("config", [dl.VPTConfig(num_tokens=3), dl.MonaConfig(bottleneck=4), dl.LoRAConfig(r=2)])
def test_checkpointing_saves_memory_and_changes_nothing(config):
    found, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny("ViTForImageClassification")
        randomize_adapter(dl.attach(model, config))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            logits = model(images()).logits
        saved.append(sum(kept))
        logits.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert saved[1] < 0.7 * saved[0]
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_dropout_and_drop_path_of_the_library():
    """In train mode the frozen backbone's dropout is off; with methods that keep it, it is as the library draws it."""
    model = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2)
    dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=4)).train()
    assert torch.equal(model(images()).logits, model(images()).logits)
    plain = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2).train()
    torch.manual_seed(3)
    with torch.no_grad():
        expected = plain(images()).logits
    adapted = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2)
    dl.attach(adapted, dl.VPTConfig(num_tokens=3))
    with dl.disable_adapter(adapted), torch.no_grad():
        for module in adapted.modules():
            module.training = True
        torch.manual_seed(3)
        assert torch.equal(adapted(images()).logits, expected)


def test_copies_pickles_and_precision():
    model = tiny("ViTForImageClassification")
    randomize_adapter(dl.attach(model, [dl.VPTConfig(num_tokens=3), dl.MonaConfig(bottleneck=4)])).eval()
    expected = model(images()).logits
    assert torch.equal(copy.deepcopy(model)(images()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()).logits, expected)
    assert isinstance(model, transformers.ViTForImageClassification)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()).logits.float(), expected, atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViTForImageClassification", dl.VPTConfig(num_tokens=3)),
        pytest.param("Dinov2ForImageClassification", dl.VPTConfig(num_tokens=3, deep=False), marks=pytest.mark.slow),
        pytest.param("CLIPForImageClassification", dl.MonaConfig(bottleneck=4), marks=pytest.mark.slow),
        pytest.param("DINOv3ViTModel", dl.VPTConfig(num_tokens=3, deep=False), marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph(name, config):
    model = tiny(name)
    randomize_adapter(dl.attach(model, config)).eval()
    with torch.no_grad():
        expected = tokens_of(model(images()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tokens_of(compiled(images())), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# ------------------------------------------------------------------ two towers, and patches of many shapes
def test_vision_tower_of_a_two_tower_model():
    model = tiny("CLIPModel")
    text = {"input_ids": torch.tensor([[1, 5, 6, 29]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dl.attach(model, dl.MonaConfig(bottleneck=4), backbone="vision_model")
    anatomy = dl.describe(model, "vision_model")
    assert [block.path for block in anatomy.blocks()] == [f"vision_model.encoder.layers.{i}" for i in range(3)]
    assert any(p.requires_grad for p in model.text_model.parameters())  # what lies around the backbone is trained
    randomize_adapter(model)
    output = model(pixel_values=images(), **text)
    output.logits_per_image.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "delta" in n)
    whole = tiny("CLIPModel")
    dl.attach(whole, dl.MonaConfig(bottleneck=4))
    assert all("vision_model" in n for n, p in whole.named_parameters() if p.requires_grad)


def test_siglip2_is_a_sequence():
    model = tiny("Siglip2VisionModel").double()
    x = torch.randn(2, 16, 3 * 64, dtype=torch.float64)
    inputs = {"pixel_values": x, "spatial_shapes": torch.tensor([[4, 4], [2, 4]])}
    inputs["pixel_attention_mask"] = torch.tensor([[1] * 16, [1] * 8 + [0] * 8])
    plain = copy.deepcopy(model)
    dl.attach(model, dl.VPTConfig(num_tokens=3))
    randomize_adapter(model)
    hidden = x.clone()
    hidden[1, 8:] += 1
    expected = model(**inputs).last_hidden_state[1, :8]
    torch.testing.assert_close(model(**{**inputs, "pixel_values": hidden}).last_hidden_state[1, :8], expected)
    assert not torch.allclose(plain(**inputs).last_hidden_state[1, :8], expected)
    for config, why in (
        (dl.VPTConfig(num_tokens=3, deep=False), "tokens.in"),
        (dl.MonaConfig(bottleneck=4), "plain sequence"),
    ):
        with pytest.raises(TypeError, match=why):
            dl.attach(tiny("Siglip2VisionModel"), config)


# ------------------------------------------------------------------ published sizes
@pytest.mark.parametrize(
    ("cls", "config", "blocks", "width", "prefix"),
    [
        ("ViTForImageClassification", "ViTConfig", 12, 768, 1),
        ("DeiTForImageClassification", "DeiTConfig", 12, 768, 2),
        ("Dinov2Model", "Dinov2Config", 12, 768, 1),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 12, 768, 5),
        ("DINOv3ViTModel", "DINOv3ViTConfig", 12, 384, 1),
        ("BeitModel", "BeitConfig", 12, 768, 1),
        ("CLIPVisionModel", "CLIPVisionConfig", 12, 768, 1),
        ("SiglipVisionModel", "SiglipVisionConfig", 12, 768, 0),
    ],
)
def test_published_architectures(cls, config, blocks, width, prefix):
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)())
    (tower,) = dl.describe(model).towers
    assert len(tower.blocks) == blocks
    assert {block.width for block in tower.blocks} == {width}
    assert tower.layout.prefix == prefix
    assert {"q", "fc2"} <= tower.blocks[0].parts.keys()
    assert "attention.prompts" in tower.blocks[0].slots
    assert tower.image_size == (224, 224)


def test_overridden_forwards_are_unknown():
    class Own(transformers.models.vit.modeling_vit.ViTLayer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs) * 2

    model = tiny("ViTForImageClassification")
    model.vit.layers[1].__class__ = Own
    slots = [block.slots for block in dl.describe(model).blocks()]
    assert "attention.prompts" in slots[0]
    assert slots[1] == {"block.stream"}


def test_save_pretrained_after_detach(tmp_path):
    model = tiny("ViTForImageClassification")
    expected = logits_of(model(images()))
    dl.detach(dl.attach(model, dl.VPTConfig(num_tokens=3), num_classes=3))
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images()).logits, expected)
    assert again.config.num_labels == 5
