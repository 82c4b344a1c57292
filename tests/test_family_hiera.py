"""timm's Hiera: true maps out of permuted tokens, prompts in mask units, blocks that change their width."""

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
from timm.models.hiera import Hiera, HieraBlock
from torch import nn

import deltalens as dl
from deltalens.backbones.timm import hiera
from deltalens.backbones.unknown import UNKNOWN_BLOCK

X = images("swin")
NOT_AS_TOKENS = "needs the slot 'tokens.in', which HieraBlock (blocks."
REFUSED = {
    "Adapter, parallel": "needs the slot 'attention.parallel', which HieraBlock (blocks.1)",
    "Convpass": "needs the slot 'attention.parallel', which HieraBlock (blocks.1)",
    "FacT": "FacT cuts layers into blocks of 16 x 16",
    "VPT-shallow": NOT_AS_TOKENS,
    "VPT, 2 of the blocks": NOT_AS_TOKENS,
    "VPT, added": NOT_AS_TOKENS,
    "VPT, added to all": NOT_AS_TOKENS,
    "VPT, patches of pixels": NOT_AS_TOKENS,
    "VPT, frame of pixels": "create it with position embeddings for other sizes, which Hiera does not have",
}


def tiny_hiera(**options):
    """3 stages of 1, 2 and 1 blocks, 8 to 32 channels; 2 x 2 mask units of 4 x 4 tokens, global in the last stage."""
    settings = {
        "img_size": (32, 32),
        "embed_dim": 8,
        "num_heads": 1,
        "stages": (1, 2, 1),
        "q_pool": 2,
        "mask_unit_size": (4, 4),
        "mask_unit_attn": (True, True, False),
        "num_classes": CLASSES,
    }
    return randomize(Hiera(**{**settings, **options})).eval()


# ------------------------------------------------------------------ rows
@pytest.mark.parametrize("row", ["Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v", "SSF"])
def test_rows(row, tmp_path):
    check_row(tiny_hiera, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_hiera, row, REFUSED, tmp_path, exported=True)


# ------------------------------------------------------------------ the true map
LAYOUTS = [
    {},
    {"img_size": (48, 32)},
    {
        "stages": (1, 1, 1, 1),
        "q_pool": 2,
        "mask_unit_size": (8, 8),
        "img_size": (32, 64),
        "mask_unit_attn": (True,) * 4,
    },
    {"q_stride": (2, 1), "mask_unit_size": (4, 2), "img_size": (32, 48)},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_layout_is_the_models_own(options):
    """Position-coded tokens of every block: in raster order as the model's own reroll has them, and back."""
    model = tiny_hiera(**options)
    layout, stride = hiera._layout(model), model.q_stride
    height, width = model.unroll.size
    code = torch.arange(height * width).view(1, height, width, 1).float()
    x = model.unroll(code.flatten(1, 2))
    assert not torch.equal(x.flatten(), code.flatten())
    for i, block in enumerate(model.blocks):
        if block.attn.q_stride > 1:  # the code of a pooled token is that of its window's last one
            x = x.view(1, block.attn.q_stride, -1, 1).amax(1)
            code = F.max_pool2d(code.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)
        found, prefix = layout.split(x)
        assert prefix is None
        assert torch.equal(found, code)
        assert torch.equal(found, model.reroll(x, i))
        assert torch.equal(layout.join(found, None), x)
        assert torch.equal(layout.split(layout.join(code, None))[0], code)
        assert dl.describe(model).blocks()[i].grid == tuple(code.shape[1:3])


class Seen(nn.Module):
    """A spatial module that keeps what it sees."""

    spatial = True

    def __init__(self):
        super().__init__()
        self.one, self.maps = nn.Parameter(torch.ones(1)), []

    def forward(self, feature_map):
        self.maps.append(feature_map.detach())
        return feature_map


class Look(dl.methods.Method):
    name = "look_at_hiera"

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, "block.stream", Seen()


def test_spatial_modules_see_what_the_model_gives_out():
    model = dl.attach(tiny_hiera(img_size=(48, 32)), Look())
    x = images("swin", size=(48, 32))
    _, expected = model.forward_intermediates(x, coarse=False, output_fmt="NHWC", stop_early=False)
    for block, feature_map in zip(model.blocks, expected, strict=True):
        assert torch.equal(block.delta.live("block.stream")[0].maps[0], feature_map)


def test_dropped_mask_units_are_an_error_for_spatial_modules_only():
    model = adapted(tiny_hiera(), dl.VPTConfig(num_tokens=2))
    mask = torch.tensor([[True, False, True, True]]).expand(2, -1)
    assert model.eval()(X, mask=mask).shape == (2, 3, 32)
    model = adapted(tiny_hiera(), dl.MonaConfig(bottleneck=4))
    with pytest.raises(RuntimeError, match="patch_drop_rate=0"):
        model(X, mask=mask)


# ------------------------------------------------------------------ prompts against the plain form
def plain_attention(attn, x, prompts):
    """Each mask unit on its own: prompts in front of its tokens, and without those of the queries that prompts are."""
    units = x.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
    out = []
    for unit in x.view(x.shape[0], -1, units, x.shape[-1]).unbind(2):
        tokens = torch.cat([prompts.expand(len(x), -1, -1), unit], 1)
        qkv = attn.qkv(tokens).view(len(x), tokens.shape[1], 3, attn.heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        q = q[:, :, prompts.shape[1] :]
        q = torch.stack(q.split(q.shape[2] // attn.q_stride, 2)).amax(0)
        y = ((q @ k.transpose(-2, -1)) / attn.head_dim**0.5).softmax(-1) @ v
        out.append(y.transpose(1, 2).flatten(2))
    return attn.proj(torch.stack(out, 2).flatten(1, 2))


def plain_block(block, x, prompts):
    normed, residual = block.norm1(x), x
    if block.do_expand:
        parts = (block.proj(normed) if block.proj is not None else x).chunk(block.attn.q_stride, 1)
        residual = torch.stack(parts).amax(0)
        if block.proj is None:
            residual = torch.cat([residual, torch.stack(parts).mean(0)], -1)
    x = residual + block.ls1(plain_attention(block.attn, normed, block.norm1(prompts)))
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1, "use_expand_proj": False, "img_size": (32, 48), "abs_win_pos_embed": True}],
    ids=str,
)
def test_prompts_equal_the_plain_form(options):
    model = adapted(tiny_hiera(**options).double(), dl.VPTConfig(num_tokens=3))
    plain = tiny_hiera(**options).double().requires_grad_(False)
    widths = [block.delta.live("attention.prompts")[0].embedding.shape[1] for block in model.blocks]
    assert widths == [8, 8, 16, 16]

    def run(x):
        x = plain.unroll(plain._pos_embed(plain.patch_embed(x)))
        for block, own in zip(model.blocks, plain.blocks, strict=True):
            x = plain_block(own, x, block.delta.live("attention.prompts")[0].embedding[None])
        return model.head.fc(plain.head.norm(x.mean(1)))

    x = images("swin", size=options.get("img_size", (32, 32))).double()
    assert_same_run(model, run, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same_run(model, run, x)
    assert_merges(model, x, plain_class=False)


def test_prompts_from_outputs_have_another_width():
    with pytest.raises(ValueError, match=r"blocks\.1, 8 wide, from the block's output, 16 wide"):
        dl.attach(tiny_hiera(), dl.VPTConfig(num_tokens=5, init="cls-nofirstl"))


# ------------------------------------------------------------------ the equation where the width changes
class Scaled(nn.Module):
    def __init__(self, width, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float(factor)))

    def forward(self, x):
        return self.weight * x + 1


class Everywhere(dl.methods.Method):
    name = "everywhere_in_hiera"

    def place(self, anatomy):
        for block in anatomy.blocks():
            for i, slot in enumerate(("pre", "inner", "stream")):
                for j, branch in enumerate(("attention", "mlp")):
                    name = f"{branch}.{slot}"
                    yield block, name, Scaled(block.width_of(name), 0.3 + 0.2 * i + 0.1 * j)


@pytest.mark.parametrize("projected", [True, False])
def test_slots_of_blocks_that_change_the_width(projected):
    options = {"use_expand_proj": projected, "init_values": 0.1}
    model, plain = dl.attach(tiny_hiera(**options).double(), Everywhere()), tiny_hiera(**options).double()

    def forward(block, x):
        n, stride = block.norm1(x), block.attn.q_stride
        if block.do_expand and block.proj is not None:
            x = block.proj(n).view(len(x), stride, -1, block.dim_out).amax(1)
        elif block.do_expand:
            parts = x.view(len(x), stride, -1, block.dim)
            x = torch.cat([parts.amax(1), parts.mean(1)], -1)
        x = 0.7 * (x + 0.5 * block.ls1(block.attn(0.3 * n + 1)) + 1) + 1
        return 0.8 * (x + 0.6 * block.ls2(block.mlp(0.4 * block.norm2(x) + 1)) + 1) + 1

    x = plain.unroll(plain._pos_embed(plain.patch_embed(X.double())))
    for block in plain.blocks:
        x = forward(block, x)
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), plain.forward_head(x), atol=1e-6, rtol=1e-6)


PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


@pytest.mark.parametrize("use_expand_proj", [True, False])
def test_nothing_added_is_nothing_changed(use_expand_proj):
    for config in (dl.MonaConfig(bottleneck=4, init="identity", dropout=0.0), dl.LoRAConfig(r=2, parts=PARTS)):
        make = lambda: tiny_hiera(drop_path_rate=0.5, use_expand_proj=use_expand_proj)  # noqa: E731
        assert_untouched_by_zero(make, X, config)


def test_merging():
    configs = [dl.LoRAConfig(r=2, parts=PARTS), dl.RepAdapterConfig(bottleneck=4)]
    assert_merges(adapted(tiny_hiera().double(), configs), X.double())
    expand = adapted(tiny_hiera(stages=(1, 1), q_pool=1).double(), dl.SSFConfig())
    assert hasattr(expand.blocks[1].proj, "delta")
    assert_merges(expand, X.double())


# ------------------------------------------------------------------ what is known
def test_blocks_with_a_forward_of_their_own_are_unknown():
    class Other(HieraBlock):
        def forward(self, x):
            return super().forward(x)

    model = tiny_hiera()
    model.blocks[1].__class__ = Other
    families = [block.family for block in dl.describe(model).blocks()]
    assert families == [hiera.BLOCK, UNKNOWN_BLOCK, hiera.BLOCK, hiera.POOLING_BLOCK]


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("hiera_tiny_224")
    (tower,) = dl.describe(model).towers
    assert [block.width for block in tower.blocks] == [96] + [192] * 2 + [384] * 7 + [768] * 2
    assert [block.index for block in tower.blocks if block.family is hiera.POOLING_BLOCK] == [1, 3, 10]
    assert [block.grid for block in tower.blocks][::5] == [(56, 56), (14, 14), (7, 7)]
    assert set(tower.blocks[1].parts) == {*PARTS, "expand"}
    assert tower.blocks[3].width_of("attention.prompts") == 192
    assert tower.image_size == (224, 224)


@pytest.mark.slow
def test_compiled():
    model = adapted(tiny_hiera(stages=(1, 1), q_pool=1), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)])
    compiled_equals_eager(model, X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_hiera(), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
