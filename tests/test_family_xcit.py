"""timm's XCiT: three branches, prompts in the covariance but not in the convolutions, no prompts as keys."""

import pytest
import timm
import torch
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
from timm.models.xcit import XCABlock, Xcit
from torch import nn

import deltalens as dl
from deltalens.backbones.timm import xcit
from deltalens.backbones.unknown import UNKNOWN_BLOCK

X = images("vit")
NO_KEYS = "needs the slot 'attention.prompts', which XCABlock (blocks.0)"
REFUSED = {
    "VPT-deep": NO_KEYS,
    "VPT, 2 of the blocks": NO_KEYS,
    "VPT, shared": NO_KEYS,
    "VPT, class prototypes": NO_KEYS,
    "VPT and BitFit": NO_KEYS,
    "VPT, prefix": NO_KEYS,
    "VPT, patches of pixels": "needs a patch embedding",
}
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def tiny_xcit(**options):
    """3 blocks and 2 of class attention, 24 channels, 3 heads, 4 x 4 patches of 8 px."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
    return randomize(Xcit(**{**settings, **options})).eval()


# ------------------------------------------------------------------ rows
@pytest.mark.parametrize("row", ["Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v"])
def test_rows(row, tmp_path):
    check_row(tiny_xcit, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_xcit, row, REFUSED, tmp_path, exported=True)


# ------------------------------------------------------------------ the plain form
def embedded(model, x):
    x, (height, width) = model.patch_embed(x)
    position = model.pos_embed(len(x), height, width).flatten(2).transpose(1, 2) if model.pos_embed is not None else 0
    return x + position, height, width


def behind(plain, head, x):
    """Class attention, norm and head on patch tokens."""
    return head(plain.forward_head(plain.norm(plain.forward_cls(x)), pre_logits=True))


@pytest.mark.parametrize("options", [{}, {"tokens_norm": True, "use_pos_embed": False}], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_prompts_that_live_on_equal_the_plain_form(options, size):
    """timm's own cross-covariance attention and MLP over prompts and patches, its convolutions over patches."""
    model = adapted(tiny_xcit(**options).double(), dl.VPTConfig(num_tokens=3, deep=False))
    plain = tiny_xcit(**options).double().requires_grad_(False)

    def run(x):
        x, height, width = embedded(plain, x)
        (module,) = model.blocks[0].delta.live("tokens.in")
        x = torch.cat([module.embedding.expand(len(x), -1, -1), x], 1)
        for block in plain.blocks:
            x = x + block.gamma1 * block.attn(block.norm1(x))
            prompts, patches = x[:, :3], x[:, 3:]
            patches = patches + block.gamma3 * block.local_mp(block.norm3(patches), height, width)
            x = torch.cat([prompts, patches], 1)
            x = x + block.gamma2 * block.mlp(block.norm2(x))
        return behind(plain, model.head, x[:, 3:])

    assert_same_run(model, run, images("vit", size=size).double())


def test_added_tokens_stay_among_the_patches():
    model, plain = adapted(tiny_xcit(), dl.VPTConfig(num_tokens=3, deep=False)), tiny_xcit()
    for options in ({}, {"indices": [0], "stop_early": True, "norm": True}, {"output_fmt": "NLC"}):
        (final, taps), (own_final, own_taps) = (m.forward_intermediates(X, **options) for m in (model, plain))
        assert final.shape == own_final.shape
        assert [tap.shape for tap in taps] == [tap.shape for tap in own_taps]
    assert model.forward_features(X).shape == (2, 17, 24)


# ------------------------------------------------------------------ the equation
class Scaled(nn.Module):
    """f(u) = factor * u + 1, or delta = factor * x + n."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, n=None):
        return self.factor * x + (1 if n is None else n)


class Everywhere(dl.methods.Method):
    name = "everywhere_in_xcit"

    def place(self, anatomy):
        for block in anatomy.blocks():
            for i, slot in enumerate(("pre", "inner", "parallel", "stream")):
                for j, branch in enumerate(("attention", "local", "mlp")):
                    yield block, f"{branch}.{slot}", Scaled(0.3 + 0.2 * i + 0.05 * j)


@pytest.mark.parametrize("fused", [True, False])
def test_slots_of_three_branches(fused):
    model, plain = dl.attach(tiny_xcit().double(), Everywhere()), tiny_xcit().double()
    for block in [*model.blocks, *plain.blocks]:
        block.attn.fused_attn = fused
    x, height, width = embedded(plain, X.double())
    for block in plain.blocks:
        for i, (gamma, body, norm) in enumerate(
            (
                (block.gamma1, block.attn, block.norm1),
                (block.gamma3, lambda n, block=block: block.local_mp(n, height, width), block.norm3),
                (block.gamma2, block.mlp, block.norm2),
            )
        ):
            n, step = norm(x), 0.05 * i
            u = (0.5 + step) * gamma * body((0.3 + step) * n + 1) + 1
            x = (0.9 + step) * (x + u + (0.7 + step) * x + n) + 1
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), behind(plain, plain.head, x), atol=1e-5, rtol=1e-5)


def test_nothing_added_is_nothing_changed():
    make = lambda: tiny_xcit(drop_path_rate=0.5, proj_drop_rate=0.2)  # noqa: E731
    for config in (dl.LoRAConfig(r=2, parts=PARTS), dl.AdapterConfig.houlsby(4)):
        assert_untouched_by_zero(make, X, config)


def test_merging():
    configs = [dl.LoRAConfig(r=2, parts=PARTS), dl.RepAdapterConfig(bottleneck=4)]
    assert_merges(adapted(tiny_xcit().double(), configs), X.double())
    assert_merges(adapted(tiny_xcit().double(), dl.SSFConfig()), X.double())


# ------------------------------------------------------------------ what is known
def test_a_block_with_a_forward_of_its_own_makes_all_unknown():
    class Other(XCABlock):
        def forward(self, x, H, W):
            return super().forward(x, H, W)

    model = tiny_xcit()
    model.blocks[1].__class__ = Other
    assert [block.family for block in dl.describe(model).blocks()] == [UNKNOWN_BLOCK] * 3
    assert adapted(model, dl.MonaConfig(bottleneck=4))(X).shape == (2, CLASSES)


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("xcit_nano_12_p16_224")
    (tower,) = dl.describe(model).towers
    assert [(block.family, block.width, block.grid) for block in tower.blocks] == [(xcit.BLOCK, 128, (14, 14))] * 12
    assert set(tower.blocks[0].parts) == set(PARTS)
    assert (tower.image_size, tower.patch_size) == ((224, 224), (16, 16))


@pytest.mark.slow
def test_compiled():
    configs = [dl.VPTConfig(num_tokens=2, deep=False), dl.MonaConfig(bottleneck=4)]
    compiled_equals_eager(adapted(tiny_xcit(depth=2), configs), X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_xcit(), [dl.VPTConfig(num_tokens=2, deep=False), dl.MonaConfig(bottleneck=4)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
