"""timm's CaiT: talking heads with prompts, a class token that never meets adapters' tokens."""

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
from timm.models.cait import Cait, LayerScaleBlock

import deltalens as dl
from deltalens.backbones.timm import cait
from deltalens.backbones.unknown import UNKNOWN_BLOCK

X = images("vit")
REFUSED = {"VPT, frame of pixels": "create it with position embeddings for other sizes, which Cait does not have"}
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def tiny_cait(**options):
    """3 blocks and 2 of class attention, 24 channels, 3 heads, 4 x 4 patches of 8 px."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
    return randomize(Cait(**{**settings, **options})).eval()


# ------------------------------------------------------------------ rows
@pytest.mark.parametrize("row", ["Mona", "VPT-shallow", "LoRA on q, v"])
def test_rows(row, tmp_path):
    check_row(tiny_cait, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_cait, row, REFUSED, tmp_path, exported=True)


def test_a_head_of_adapters_tokens_is_refused():
    with pytest.raises(TypeError, match="needs the slot 'pool', which Cait"):
        dl.attach(tiny_cait(), dl.VPTConfig(num_tokens=2, pool="prompts"))


# ------------------------------------------------------------------ prompts against the plain form
def embedded(model, x):
    return model.patch_embed(x) + model.pos_embed


def behind(plain, head, x):
    """Class attention, norm and head on patch tokens."""
    return head(plain.forward_head(plain.norm(plain.forward_cls(x)), pre_logits=True))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "global_pool": "avg"}], ids=str)
def test_prompts_as_keys_and_values_equal_the_plain_form(options):
    """timm's own talking heads over prompts and patches, without the prompts' outputs."""
    model = adapted(tiny_cait(**options).double(), dl.VPTConfig(num_tokens=3))
    plain = tiny_cait(**options).double().requires_grad_(False)

    def run(x):
        x = embedded(plain, x)
        for block, own in zip(model.blocks, plain.blocks, strict=True):
            (module,) = block.delta.live("attention.prompts")
            tokens = torch.cat([module.embedding.expand(len(x), -1, -1), x], 1)
            x = x + own.gamma_1 * own.attn(own.norm1(tokens))[:, 3:]
            x = x + own.gamma_2 * own.mlp(own.norm2(x))
        return behind(plain, model.head, x)

    assert_same_run(model, run, X.double())
    assert_merges(model, X.double(), plain_class=False)


def test_prompts_that_live_on_equal_the_plain_form():
    model = adapted(tiny_cait().double(), dl.VPTConfig(num_tokens=3, deep=False))
    plain = tiny_cait().double().requires_grad_(False)

    def run(x):
        (module,) = model.blocks[0].delta.live("tokens.in")
        tokens = torch.cat([module.embedding.expand(len(x), -1, -1), embedded(plain, x)], 1)
        return behind(plain, model.head, plain.blocks(tokens)[:, 3:])

    assert_same_run(model, run, X.double())


def test_added_tokens_stay_among_the_patches():
    model, plain = adapted(tiny_cait(), dl.VPTConfig(num_tokens=3, deep=False)), tiny_cait()
    read = []
    model.blocks_token_only[0].register_forward_hook(lambda m, args, y: read.append(args[0].shape[1]))
    for options in ({}, {"indices": [0], "stop_early": True, "norm": True}, {"output_fmt": "NLC"}):
        (final, taps), (own_final, own_taps) = (m.forward_intermediates(X, **options) for m in (model, plain))
        assert final.shape == own_final.shape
        assert [tap.shape for tap in taps] == [tap.shape for tap in own_taps]
    assert model.forward_features(X).shape == (2, 17, 24)
    assert read == [16] * 4
    taps = model.forward_intermediates(X, indices=[2], output_fmt="NLC", intermediates_only=True)
    maps = model.forward_intermediates(X, indices=[2], intermediates_only=True)
    assert torch.equal(taps[0].transpose(1, 2).reshape(2, 24, 4, 4), maps[0])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(X, output_fmt="NHWC")


# ------------------------------------------------------------------ the equation
def test_houlsby_behind_the_layer_scale():
    model, plain = adapted(tiny_cait().double(), dl.AdapterConfig.houlsby(4)), tiny_cait().double()
    x = embedded(plain, X.double())
    for block, own in zip(model.blocks, plain.blocks, strict=True):
        (first,), (second,) = (block.delta.live(f"{branch}.inner") for branch in ("attention", "mlp"))
        x = x + first(own.gamma_1 * own.attn(own.norm1(x)))
        x = x + second(own.gamma_2 * own.mlp(own.norm2(x)))
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), behind(plain, model.head, x), atol=1e-10, rtol=1e-10)


def test_nothing_added_is_nothing_changed():
    make = lambda: tiny_cait(drop_path_rate=0.5, proj_drop_rate=0.2)  # noqa: E731
    for config in (dl.FacTConfig(r=2, dropout=0.0), dl.ConvpassConfig(bottleneck=4, dropout=0.0)):
        assert_untouched_by_zero(make, X, config)


def test_merging():
    configs = [dl.LoRAConfig(r=2, parts=PARTS), dl.RepAdapterConfig(bottleneck=4)]
    assert_merges(adapted(tiny_cait().double(), configs), X.double())


def test_class_attention_is_reached_by_name():
    model = dl.attach(tiny_cait(), dl.LoRAConfig(r=2, target_modules=r"blocks_token_only\.\d\.attn\.[qv]"))
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 4
    assert {block.path.split(".")[0] for block in dl.describe(model).blocks()} == {"blocks"}


# ------------------------------------------------------------------ what is known
def test_blocks_with_a_forward_of_their_own_are_unknown():
    class Other(LayerScaleBlock):
        def forward(self, x):
            return super().forward(x)

    model = tiny_cait()
    model.blocks[1].__class__ = Other
    assert [block.family for block in dl.describe(model).blocks()] == [cait.BLOCK, UNKNOWN_BLOCK, cait.BLOCK]


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("cait_xxs24_224")
    (tower,) = dl.describe(model).towers
    assert [(block.family, block.width, block.grid) for block in tower.blocks] == [(cait.BLOCK, 192, (14, 14))] * 24
    assert set(tower.blocks[0].parts) == set(PARTS)
    assert tower.image_size == (224, 224)


@pytest.mark.slow
def test_compiled():
    compiled_equals_eager(adapted(tiny_cait(depth=2), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)]), X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_cait(), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
