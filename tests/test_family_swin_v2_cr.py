"""timm's other Swin v2: norms on the stream, maps (B, C, H, W) between stages, prompts beside them."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from family_checks import (
    adapted,
    assert_merges,
    assert_same_run,
    assert_untouched_by_zero,
    check_row,
    check_row_names,
    compiled_equals_eager,
)
from matrix import ROWS
from models import CLASSES, images, randomize
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock, window_partition
from timm.models.swin_transformer_v2_cr import window_reverse as reverse
from torch import nn

import deltalens as dl
from deltalens.backbones.timm import swin_v2_cr

X = images("swin")
REFUSED = {"VPT, frame of pixels": "create it with strict_img_size=False"}
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def tiny_swin_v2_cr(**options):
    """2 stages of 2 blocks, 12 and 24 channels, windows of 4; a norm on the stream ends each stage."""
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "extra_norm_stage": True,
        "num_classes": CLASSES,
    }
    return randomize(SwinTransformerV2Cr(**{**settings, **options})).eval()


def blocks_of(model):
    return [block for stage in model.stages for block in stage.blocks]


@pytest.mark.parametrize("row", ["VPT-shallow"])
def test_rows(row, tmp_path):
    check_row(tiny_swin_v2_cr, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_swin_v2_cr, row, REFUSED, tmp_path, exported=True)


# ------------------------------------------------------------------ prompts against the plain form
def plain_attention(attn, tokens, mask, prompts):
    """timm's attention with p prompts in front of each window's tokens, (windows, p + area, C), bias zero for them."""
    windows, length, width = tokens.shape
    q, k, v = attn.qkv(tokens).view(windows, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scale = attn.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    bias = scores.new_zeros(windows, attn.num_heads, length, length)
    bias[:, :, prompts:, prompts:] = attn._relative_positional_encodings()
    if mask is not None:
        bias[:, :, prompts:, prompts:] += mask.repeat(windows // len(mask), 1, 1)[:, None]
    y = (scores + bias).softmax(-1) @ v
    return attn.proj(y.transpose(1, 2).reshape(windows, length, width))


def plain_block(block, x, prompts):
    (batch, height, width, channels), size, count = x.shape, block.window_size, prompts.shape[1]
    shifted = torch.roll(x, tuple(-s for s in block.shift_size), (1, 2))
    shifted = F.pad(shifted, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    mask, padded = block.get_attn_mask(shifted), shifted.shape[1:3]
    windows = window_partition(shifted, size).view(batch, -1, block.window_area, channels)
    tokens = torch.cat([prompts[:, None].expand(-1, windows.shape[1], -1, -1), windows], 2).flatten(0, 1)
    y = plain_attention(block.attn, tokens, mask, count)
    update = reverse(y[:, count:].reshape(-1, *size, channels), size, padded)[:, :height, :width]
    of_prompts = y[:, :count].unflatten(0, (batch, -1)).mean(1)
    x = x + block.norm1(torch.roll(update, block.shift_size, (1, 2)))
    prompts = prompts + block.norm1(of_prompts)
    return tuple(block.norm3(z + block.norm2(block.mlp(z))) for z in (x, prompts))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("options", [{}, {"img_size": (24, 40)}], ids=str)
def test_prompts_equal_the_plain_form(deep, options):
    model = adapted(tiny_swin_v2_cr(**options).double(), dl.VPTConfig(num_tokens=3, deep=deep))
    plain = tiny_swin_v2_cr(**options).double().requires_grad_(False)
    assert any(any(block.shift_size) for block in blocks_of(plain))

    def run(x):
        x, prompts, adapted_blocks = plain.patch_embed(x).permute(0, 2, 3, 1), None, iter(blocks_of(model))
        for stage in plain.stages:
            if not isinstance(stage.downsample, nn.Identity):
                prompts = stage.downsample.reduction(stage.downsample.norm(torch.cat([prompts] * 4, -1)))
            x = stage.downsample(x)
            for block in stage.blocks:
                slots = next(adapted_blocks).delta
                own = slots.live("attention.prompts") + slots.live("tokens.in")
                prompts = own[0].embedding.expand(len(x), -1, -1) if own else prompts
                x, prompts = plain_block(block, x, prompts)
        return model.head.fc(torch.cat([prompts, x.flatten(1, 2)], 1).mean(1))

    assert_same_run(model, run, images("swin", size=options.get("img_size", (32, 32))).double())


def test_prompts_never_come_out():
    model = adapted(tiny_swin_v2_cr(), dl.VPTConfig(num_tokens=3, deep=False))
    plain = tiny_swin_v2_cr()
    assert model.forward_features(X).shape == plain.forward_features(X).shape
    found, expected = model.forward_intermediates(X), plain.forward_intermediates(X)
    assert [tap.shape for tap in found[1]] == [tap.shape for tap in expected[1]]
    assert found[0].shape == expected[0].shape
    assert len(model.forward_intermediates(X, intermediates_only=True, indices=[1])) == 1


def test_a_head_of_the_patches_only():
    model = adapted(tiny_swin_v2_cr(), dl.VPTConfig(num_tokens=3, pool="patches"))
    expected = model.head.fc(model.forward_features(X).mean((2, 3)))
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ the equation
def test_houlsby_behind_the_norms():
    """The bottlenecks see what has passed norm1 and norm2; norm3 comes after them."""
    model, plain = adapted(tiny_swin_v2_cr().double(), dl.AdapterConfig.houlsby(4)), tiny_swin_v2_cr().double()
    norms = [not isinstance(block.norm3, nn.Identity) for block in blocks_of(plain)]
    assert norms == [False, True, False, True]
    x, adapted_blocks = plain.patch_embed(X.double()).permute(0, 2, 3, 1), iter(blocks_of(model))
    for stage in plain.stages:
        x = stage.downsample(x)
        for block in stage.blocks:
            slots = next(adapted_blocks).delta
            (first,), (second,) = (slots.live(f"{branch}.inner") for branch in ("attention", "mlp"))
            x = x + first(block.norm1(block._shifted_window_attn(x)))
            x = block.norm3(x + second(block.norm2(block.mlp(x))))
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), model.head.fc(x.mean((1, 2))), atol=1e-10, rtol=1e-10)


def test_nothing_added_is_nothing_changed():
    make = lambda: tiny_swin_v2_cr(drop_path_rate=0.5)  # noqa: E731
    for config in (dl.FacTConfig(r=2, dropout=0.0), dl.ConvpassConfig(bottleneck=4, dropout=0.0)):
        assert_untouched_by_zero(make, X, config)


def test_merging():
    configs = [dl.LoRAConfig(r=2, parts=PARTS), dl.SSFConfig(), dl.RepAdapterConfig(bottleneck=4)]
    assert_merges(adapted(tiny_swin_v2_cr().double(), configs), X.double())


def test_blocks_with_a_forward_of_their_own_are_unknown():
    class Other(SwinTransformerV2CrBlock):
        def forward(self, x):
            return super().forward(x)

    model = tiny_swin_v2_cr()
    blocks_of(model)[1].__class__ = Other
    assert not list(swin_v2_cr.find_towers(model))


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("swinv2_cr_tiny_ns_224")
    (tower,) = dl.describe(model).towers
    assert [block.width for block in tower.blocks] == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert {block.family for block in tower.blocks} == {swin_v2_cr.BLOCK}
    assert set(tower.blocks[0].parts) == set(PARTS)
    assert (tower.blocks[0].grid, tower.image_size) == ((56, 56), (224, 224))


@pytest.mark.slow
def test_compiled():
    configs = [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)]
    compiled_equals_eager(adapted(tiny_swin_v2_cr(depths=(1, 1)), configs), X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_swin_v2_cr(), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
