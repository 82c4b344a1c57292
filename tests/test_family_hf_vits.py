"""transformers' ViT-like towers: prompts, formulas, recorded states, and the matrix of methods."""

import copy

import pytest
import torch
from hf_models import tiny
from matrix import LABELS, ROWS, export, refusal, walk
from models import randomize_adapter
from torch import nn

import deltalens as dl

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
@pytest.mark.parametrize("row", [NO_PATCHES, "VPT, frame of pixels", "VPT, image channels", "VPT, added", "FacT"])
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
