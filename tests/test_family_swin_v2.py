"""timm's Swin v2: post-norm blocks, cosine attention, a qkv layer that timm goes around, prompts beside the map."""

import math
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from family_checks import (
    HANDFUL,
    adapted,
    assert_merges,
    assert_same_run,
    assert_untouched_by_zero,
    check_row,
    check_row_names,
    compiled_equals_eager,
)
from matrix import ROWS
from models import images, tiny_swin_v2
from timm.models.swin_transformer_v2 import window_partition, window_reverse
from torch import nn

import deltalens as dl
from deltalens.backbones.timm import swin_v2
from deltalens.sites.swap import Swapped

X = images("swin")
REFUSED = {"VPT, frame of pixels": "create it with strict_img_size=False"}


def ready(**options):
    """With a `k_bias` that is not zero, as merged networks may have, and shapes that need padding where asked."""
    return tiny_swin_v2(**options)


def blocks_of(model):
    return [block for stage in model.layers for block in stage.blocks]


# ------------------------------------------------------------------ rows
@pytest.mark.parametrize("row", HANDFUL)
def test_rows(row, tmp_path):
    check_row(tiny_swin_v2, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_swin_v2, row, REFUSED, tmp_path, exported=True)


def test_a_frame_of_pixels_where_sizes_are_free():
    model = adapted(tiny_swin_v2(strict_img_size=False), dl.VPTConfig(num_tokens=4, location="padding", deep=False))
    assert model(X).shape == (2, 5)


# ------------------------------------------------------------------ prompts against the plain form
def plain_attention(attn, tokens, mask, prompts):
    """timm's attention with p prompts in front of each window's tokens, (windows, p + area, C), bias zero for them."""
    windows, length, width = tokens.shape
    area = length - prompts
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = F.linear(tokens, attn.qkv.weight, bias).reshape(windows, length, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * attn.logit_scale.clamp(max=math.log(100)).exp()
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    bias = 16 * torch.sigmoid(table[attn.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1))
    full = scores.new_zeros(windows, attn.num_heads, length, length)
    full[:, :, prompts:, prompts:] = bias
    if mask is not None:
        full[:, :, prompts:, prompts:] += mask.repeat(windows // len(mask), 1, 1)[:, None]
    y = (scores + full).softmax(-1) @ v
    return attn.proj(y.transpose(1, 2).reshape(windows, length, width))


def plain_windows(block, x, prompts):
    """A map and prompts (B, p, C) through the shifted windows: the map's update and the mean of the copies'."""
    batch, height, width, channels = x.shape
    size, count = block.window_size, prompts.shape[1]
    x = torch.roll(x, tuple(-s for s in block.shift_size), (1, 2))
    x = F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    padded = x.shape[1:3]
    mask = block.get_attn_mask(x)
    windows = window_partition(x, size).view(batch, -1, block.window_area, channels)
    copies = prompts[:, None].expand(-1, windows.shape[1], -1, -1)
    tokens = torch.cat([copies, windows], 2).flatten(0, 1)
    y = plain_attention(block.attn, tokens, mask, count)
    x = window_reverse(y[:, count:].reshape(-1, *size, channels), size, padded)[:, :height, :width]
    return torch.roll(x, block.shift_size, (1, 2)), y[:, :count].unflatten(0, (batch, -1)).mean(1)


def plain_block(block, x, prompts):
    update, of_prompts = plain_windows(block, x, prompts)
    x, prompts = x + block.norm1(update), prompts + block.norm1(of_prompts)
    return x + block.norm2(block.mlp(x)), prompts + block.norm2(block.mlp(prompts))


def plain_network(plain, prompts_of, head):
    """The network in which every block's prompts are tokens of each window, and those that come out are dropped as soon
    as the next block has its own."""

    def run(x):
        x, prompts, i = plain.patch_embed(x), None, 0
        for stage in plain.layers:
            if prompts is not None and not isinstance(stage.downsample, nn.Identity):
                down = stage.downsample
                prompts = down.norm(down.reduction(torch.cat([prompts] * 4, -1)))
            x = stage.downsample(x)
            for block in stage.blocks:
                if prompts_of(i) is not None:
                    prompts = prompts_of(i).expand(len(x), -1, -1)
                x, prompts = plain_block(block, x, prompts)
                i += 1
        tokens = torch.cat([prompts, x.flatten(1, 2)], 1)
        return head(plain.norm(tokens).mean(1))

    return run


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"img_size": (24, 40), "window_size": 4}], ids=str)
def test_prompts_equal_the_plain_form(deep, options):
    model = adapted(tiny_swin_v2(**options).double(), dl.VPTConfig(num_tokens=3, deep=deep))
    plain = tiny_swin_v2(**options).double().requires_grad_(False)
    x = images("swin", size=options.get("img_size", (32, 32))).double()
    assert any(any(block.shift_size) for block in blocks_of(plain))

    def prompts_of(i):
        slots = blocks_of(model)[i].delta
        modules = slots.live("attention.prompts") + slots.live("tokens.in")
        return modules[0].embedding[None] if modules else None

    assert_same_run(model, plain_network(plain, prompts_of, model.head.fc), x)


def test_prompts_behind_the_last_prompted_block_live_on():
    model = adapted(tiny_swin_v2(), dl.VPTConfig(num_tokens=3, depth=2))
    seen = []
    for stage in model.layers:
        stage.register_forward_hook(lambda m, args, y: seen.append(y))
    plain = model(X)
    assert [isinstance(y, tuple) for y in seen] == [True, True]
    assert seen[1][1].shape == (2, 3, 24)
    final, taps = model.forward_intermediates(X)
    assert [tuple(tap.shape) for tap in taps] == [(2, 12, 8, 8), (2, 24, 4, 4)]
    assert torch.equal(final, model.forward_features(X))
    assert final.shape == (2, 4, 4, 24)
    assert torch.equal(model(X), plain)


def test_given_keys_are_used_as_they_are():
    """Keys of the prefix form enter the attention without norm, values without projection."""
    model = adapted(tiny_swin_v2().double(), dl.VPTConfig(num_tokens=2, location="prefix"))
    block, taken = blocks_of(model)[0], []
    block.register_forward_hook(lambda m, args, y: taken.append((args[0], y)))
    model(X.double())
    read, y = taken[0]
    (prefix,) = block.delta.live("attention.prompts")
    tokens = window_partition(read, block.window_size).flatten(1, 2)
    attn = block.attn
    q, k, v = F.linear(tokens, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])).unflatten(
        -1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # fmt: skip
    k = torch.cat([prefix.keys.expand(len(k), -1, -1, -1), F.normalize(k, dim=-1)], 2)
    v = torch.cat([prefix.values.expand(len(v), -1, -1, -1), v], 2)
    scores = F.normalize(q, dim=-1) @ k.transpose(-2, -1) * attn.logit_scale.clamp(max=math.log(100)).exp()
    scores = scores + F.pad(swin_v2._position_bias(attn), (2, 0))
    update = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = read + block.norm1(window_reverse(update.view(-1, 4, 4, 12), (4, 4), (8, 8)))
    torch.testing.assert_close(y, x + block.norm2(block.mlp(x)), atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ the equation of a post-norm block
class Scaled(nn.Module):
    """f(u) = factor * u + 1, or delta = factor * x + n."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, n=None):
        return self.factor * x + (1 if n is None else n)


class Everywhere(dl.methods.Method):
    name = "everywhere_in_v2"
    slots = ("pre", "inner", "parallel", "stream")

    def place(self, anatomy):
        for block in anatomy.blocks():
            for i, branch in enumerate(("attention", "mlp")):
                for j, slot in enumerate(self.slots):
                    yield block, f"{branch}.{slot}", Scaled(0.3 + 0.1 * i + 0.2 * j)


def test_slots_of_a_post_norm_block():
    """n is x itself; what `inner` gets has passed the norm."""
    model, plain = dl.attach(tiny_swin_v2().double(), Everywhere()), tiny_swin_v2().double()

    def forward(block, x):
        for factor, body, norm in (
            (0.3, block._attn, block.norm1),
            (0.4, block.mlp, block.norm2),
        ):
            u = (factor + 0.2) * norm(body(factor * x + 1)) + 1
            x = x + u + ((factor + 0.4) * x + x)
            x = (factor + 0.6) * x + 1
        return x

    for block in blocks_of(plain):
        block.forward = types.MethodType(forward, block)
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), plain(X.double()), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ the layer that timm goes around
VARIANTS = [{}, {"qkv_bias": False}, {"separate": True}]


def variant(separate=False, **options):
    model = tiny_swin_v2(**options)
    for block in blocks_of(model):
        block.attn.qkv_bias_separate = separate
    return model


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_weight_changes_of_qkv_act(part, options):
    model = adapted(variant(**options).double(), dl.LoRAConfig(r=2, parts=(part,)))
    plain, row = variant(**options).double(), "qkv".index(part)
    for block, own in zip(blocks_of(model), blocks_of(plain), strict=True):
        ((first, last, module),) = block.attn.qkv.delta.changes()
        assert (first, last) == (row * block.dim, (row + 1) * block.dim)
        own.attn.qkv.weight.data[first:last] += module.weight_change()
    plain.head.fc = model.head.fc
    x = X.double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-10, rtol=1e-10)
        assert (model(x) - variant(**options).double()(x)).abs().max() > 1e-3
    assert_merges(model, x)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_scaled_qkv(options):
    """SSF reads the layer's output with the biases that timm splices in; merged, the layer has them for its own."""
    model = adapted(variant(**options).double(), dl.SSFConfig(exclude=r"(?!.*qkv).*"))
    plain, x = variant(**options).double(), X.double()
    for block, own in zip(blocks_of(model), blocks_of(plain), strict=True):
        ((_, _, ssf),) = block.attn.qkv.delta.changes()
        bias = 0 if block.attn.q_bias is None else torch.cat([own.attn.q_bias, own.attn.k_bias, own.attn.v_bias])
        own.attn.qkv.weight.data *= ssf.scale[:, None]
        own.attn.qkv.bias = nn.Parameter(ssf.shift + ssf.scale * bias)
        own.attn.q_bias = None
    plain.head.fc = model.head.fc
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-10, rtol=1e-10)
    assert_merges(model, x)


def test_merging_keeps_what_reads_a_bias_of_qkv():
    """Mona keeps the blocks swapped: their reading, too, adds the bias that merging made."""
    rep, ssf = dl.RepAdapterConfig(bottleneck=4), dl.SSFConfig()
    configs = [dl.MonaConfig(bottleneck=4), ssf, dl.VPTConfig(num_tokens=2), rep]
    assert_merges(adapted(tiny_swin_v2().double(), configs), X.double(), plain_class=False)
    assert_merges(adapted(tiny_swin_v2().double(), rep), X.double())


@pytest.mark.parametrize("options", [*VARIANTS, {"strict_img_size": False, "drop_path_rate": 0.5}], ids=str)
@pytest.mark.parametrize(
    "config",
    [dl.FacTConfig(r=2, dropout=0.0), dl.ConvpassConfig(bottleneck=4, dropout=0.0)],
    ids=["fact", "convpass"],
)
def test_nothing_added_is_nothing_changed(options, config):
    assert_untouched_by_zero(lambda: variant(**options), X, config)


@pytest.mark.slow
def test_wrappers_of_qkv_act():
    model = adapted(tiny_swin_v2(), dl.make_config("peft/loha", r=2, target_modules=["qkv"]))
    with torch.no_grad():
        assert (model(X) - tiny_swin_v2()(X)).abs().max() > 1e-3
    model(X).sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "hada" in name)


def test_attention_is_swapped_only_where_qkv_is_changed():
    def swapped(model):
        return [isinstance(block.attn, Swapped) for block in blocks_of(model)]

    model = dl.attach(tiny_swin_v2(), dl.LoRAConfig(r=2, target_modules=r"layers\.\d\.blocks\.\d\.mlp\.fc1"))
    assert not any(swapped(model))
    model = dl.attach(tiny_swin_v2(), dl.LoRAConfig(r=2, target_modules=r"layers\.0\.blocks\.1\.attn\.qkv"))
    assert swapped(model) == [False, True, False, False]
    assert not any(hasattr(block, "delta") for block in blocks_of(model))
    dl.detach(model)
    assert not any(swapped(model))


# ------------------------------------------------------------------ what is known
def test_blocks_with_a_forward_of_their_own_are_unknown():
    class Other(timm.models.swin_transformer_v2.SwinTransformerV2Block):
        def forward(self, x):
            return super().forward(x) + x

    model = tiny_swin_v2()
    blocks_of(model)[2].__class__ = Other
    assert not list(swin_v2.find_towers(model))


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256")
    (tower,) = dl.describe(model).towers
    assert [block.width for block in tower.blocks] == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert {block.family for block in tower.blocks} == {swin_v2.BLOCK}
    assert tower.blocks[0].grid == (64, 64)
    assert set(tower.blocks[0].parts) == {"q", "k", "v", "proj", "fc1", "fc2"}
    assert tower.image_size == (256, 256)
    assert len(tower.carriers) == 4


@pytest.mark.slow
def test_compiled():
    model = adapted(tiny_swin_v2(depths=(1, 1)), [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2)])
    compiled_equals_eager(model, X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_swin_v2(), [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
