"""Exact shortcuts against the plain form in float64: the class-row last block, and VPT-deep as keys and values."""

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, backward, images, randomize_adapter, tiny_swin, tiny_vit
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, FullConfig, LinearConfig, LoRAConfig, MonaConfig, VPTConfig

EXACT = {"atol": 1e-10, "rtol": 1e-10}
ARCHITECTURES = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "layer scale, qk-norm": {"init_values": 0.3, "qk_norm": True},
    "attention norm, no biases": {"scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False},
    "pre-norm, fc-norm": {"pre_norm": True, "fc_norm": True, "no_embed_class": True},
}
ONE_ROW = {
    "vpt-deep": VPTConfig(num_tokens=3),
    "vpt-shallow": VPTConfig(num_tokens=3, deep=False),
    "lora everywhere": LoRAConfig(r=2, parts=("q", "k", "v", "proj", "fc1", "fc2")),
    "lora on the whole qkv": LoRAConfig(r=2, target_modules=("attn.qkv",)),
    "bitfit": BitFitConfig(),
    "linear": LinearConfig(),
    "full": FullConfig(),
    "all together": [VPTConfig(num_tokens=3), LoRAConfig(r=2), BitFitConfig()],
}


# ------------------------------------------------------------------ the last block's class row
class Full(nn.Module):
    """The classifier by way of `forward_features`, which computes every row."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_head(self.model.forward_features(x))


def rows_of_last_mlp(model, x) -> int:
    seen = []
    handle = model.blocks[-1].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("config", ONE_ROW)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_row_equals_all_rows(architecture, config):
    model, x = tiny_vit(**ARCHITECTURES[architecture]).double(), images("vit").double()
    dl.attach(model, ONE_ROW[config])
    randomize_adapter(model)
    assert rows_of_last_mlp(model, x) == 1
    found, grads = backward(model, x)
    expected, full_grads = backward(Full(model), x)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same({f"model.{name}": g for name, g in grads.items()}, full_grads, **EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_class_row_with_either_attention_kernel(fused):
    model, x = tiny_vit().double(), images("vit").double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    dl.attach(model, VPTConfig(num_tokens=3))
    torch.testing.assert_close(model(x), Full(model)(x), **EXACT)


def test_all_rows_where_one_is_not_enough():
    """Where modules look at other tokens, the head pools them, or a mask is given, nothing is cut."""
    x = images("vit")
    for options, config in (
        ({}, MonaConfig(bottleneck=4)),
        ({"global_pool": "avg"}, LoRAConfig(r=2)),
        ({"global_pool": "map"}, LoRAConfig(r=2)),
        ({"class_token": False, "global_pool": "avg"}, LoRAConfig(r=2)),
    ):
        model = tiny_vit(**options)
        dl.attach(model, config)
        assert rows_of_last_mlp(model, x) == 16 + model.num_prefix_tokens
        torch.testing.assert_close(model(x), Full(model)(x), atol=1e-6, rtol=1e-5)


class OwnHead(VisionTransformer):
    """A subclass whose head reads all tokens."""

    def forward_head(self, x, pre_logits=False):
        return self.head(x.mean(1))


def test_all_rows_for_a_subclass_with_its_own_head():
    model = OwnHead(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    dl.attach(model, LoRAConfig(r=2))
    x = images("vit")
    assert rows_of_last_mlp(model, x) == 17
    assert torch.equal(model(x), Full(model)(x))


def test_the_plain_backbone_is_untouched_by_the_shortcut():
    model, x = tiny_vit().double(), images("vit").double()
    expected = model(x)
    dl.attach(model, VPTConfig(num_tokens=3))
    with dl.disable_adapter(model):
        torch.testing.assert_close(model(x), expected, **EXACT)


# ------------------------------------------------------------------ VPT-deep in the published form
def plain_vit(model, prompts, x):
    """Prompts inserted after the prefix, overwritten at the input of every block, class token at the end."""
    prefix, count = model.num_prefix_tokens, len(prompts[0])
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    x = torch.cat([x[:, :prefix], prompts[0].expand(len(x), -1, -1), x[:, prefix:]], 1)
    for block, prompt in zip(model.blocks, prompts, strict=True):
        x = torch.cat([x[:, :prefix], prompt.expand(len(x), -1, -1), x[:, prefix + count :]], 1)
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(torch.cat([x[:, :prefix], x[:, prefix + count :]], 1)))


def plain_swin_block(block, x, prompts):
    """Prompts (B, p, C) copied into each window, zero bias for them, outputs averaged over the windows."""
    attn, size = block.attn, block.window_size
    batch, height, width, channels = x.shape
    count = prompts.shape[1]
    normed, normed_prompts = block.norm1(x), block.norm1(prompts)
    normed = torch.roll(normed, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    windows = window_partition(normed, size).view(batch, -1, block.window_area, channels)
    copies = normed_prompts[:, None].expand(-1, windows.shape[1], -1, -1)
    tokens = torch.cat([copies, windows], 2)
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = q @ k.transpose(-1, -2) * attn.scale
    bias = attn._get_rel_pos_bias().unsqueeze(1)  # (1, 1, heads, N, N)
    if block.attn_mask is not None:
        bias = bias + block.attn_mask[None, :, None]
    scores = scores + F.pad(bias, (count, 0, count, 0))
    y = attn.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))
    prompts = prompts + y[:, :, :count].mean(1)
    y = window_reverse(y[:, :, count:].reshape(-1, *size, channels), size, height, width)
    x = x + torch.roll(y, block.shift_size, (1, 2))
    return x + block.mlp(block.norm2(x)), prompts + block.mlp(block.norm2(prompts))


def plain_swin(model, prompts, x):
    """Every block gets its own prompts; the head pools the map and what the last block made of its prompts."""
    x = model.patch_embed(x)
    rows = iter(prompts)
    for stage in model.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            x, out = plain_swin_block(block, x, next(rows).expand(len(x), -1, -1))
    return model.head.fc(model.norm(torch.cat([out, x.flatten(1, 2)], 1)).mean(1))


class Plain(nn.Module):
    """The published form on the adapted model's own tensors: its slots are emptied and its prompts taken out."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form
        self.prompts = [p for name, p in model.named_parameters() if name.endswith("vpt.embedding")]

    def forward(self, x):
        return self.form(self.model, self.prompts, x)


@pytest.mark.parametrize("beside", [[], [BitFitConfig()], [LoRAConfig(r=2, parts=("q", "k", "v"))]])
@pytest.mark.parametrize(
    ("factory", "form", "options"),
    [
        (tiny_vit, plain_vit, {}),
        (tiny_vit, plain_vit, {"reg_tokens": 2, "init_values": 0.3, "qk_norm": True}),
        (tiny_vit, plain_vit, {"global_pool": "avg"}),
        (tiny_swin, plain_swin, {}),
        (tiny_swin, plain_swin, {"depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 2}),
    ],
)
def test_vpt_deep_equals_the_published_form(factory, form, options, beside):
    """With BitFit or LoRA beside it, which change the projections that prompts go through."""
    model, x = factory(**options).double(), images("vit").double()
    dl.attach(model, [VPTConfig(num_tokens=3), *beside])
    randomize_adapter(model)
    found, grads = backward(model, x)
    expected, plain_grads = backward(Plain(model, form), x)
    assert {name.removeprefix("model.") for name in plain_grads} == grads.keys()
    torch.testing.assert_close(found, expected, **EXACT)
    assert_same({f"model.{name}": g for name, g in grads.items()}, plain_grads, **EXACT)


def test_prompt_dropout_is_drawn_per_sample_and_block():
    model, x = tiny_vit(), images("vit", batch=4)
    dl.attach(model, VPTConfig(num_tokens=6, dropout=0.5))
    taken = []
    for block in model.blocks:
        (module,) = block.delta.live("attention.prompts")
        module.register_forward_hook(lambda m, args, y: taken.append((m.embedding, y)))
    model.train()(x)
    masks = []
    for embedding, y in taken:
        assert y.shape == (4, 6, 24)
        kept = y != 0
        torch.testing.assert_close(y[kept], (2 * embedding).expand_as(y)[kept])
        masks.append(kept)
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0], masks[1])
    taken.clear()
    model.eval()(x)
    assert all(torch.equal(y[0], embedding) and y.shape[0] == 1 for embedding, y in taken)
