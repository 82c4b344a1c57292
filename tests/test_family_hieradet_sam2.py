"""timm's HieraDet (SAM 2): Hiera's blocks on maps, in padded windows."""

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
from timm.models.hieradet_sam2 import HieraDet, MultiScaleBlock

import deltalens as dl
from deltalens.backbones.timm import hieradet_sam2 as sam2
from deltalens.backbones.unknown import UNKNOWN_BLOCK

X = images("swin")
NOT_AS_TOKENS = "needs the slot 'tokens.in', which MultiScaleBlock (blocks."
REFUSED = {
    "Adapter, parallel": "needs the slot 'attention.parallel', which MultiScaleBlock (blocks.1)",
    "Convpass": "needs the slot 'attention.parallel', which MultiScaleBlock (blocks.1)",
    "FacT": "FacT cuts layers into blocks of 16 x 16",
    "VPT-shallow": NOT_AS_TOKENS,
    "VPT, 2 of the blocks": NOT_AS_TOKENS,
    "VPT, added": NOT_AS_TOKENS,
    "VPT, added to all": NOT_AS_TOKENS,
    "VPT, patches of pixels": NOT_AS_TOKENS,
    "VPT, frame of pixels": "create it with position embeddings that fit any size, which HieraDet does not have",
}
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def tiny_hieradet(**options):
    """3 stages of 1, 2 and 1 blocks, 8 to 32 channels; windows of 4, 4 and 2, global attention in the third block."""
    settings = {
        "embed_dim": 8,
        "num_heads": 1,
        "stages": (1, 2, 1),
        "q_pool": 2,
        "window_spec": (4, 2, 2),
        "global_att_blocks": (2,),
        "global_pos_size": (4, 4),
        "num_classes": CLASSES,
    }
    model = HieraDet(**{**settings, **options})
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return randomize(model).eval()


@pytest.mark.parametrize("row", ["Mona"])
def test_rows(row, tmp_path):
    check_row(tiny_hieradet, row, REFUSED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_all_rows(row, tmp_path):
    check_row_names(REFUSED)
    check_row(tiny_hieradet, row, REFUSED, tmp_path, exported=True)


# ------------------------------------------------------------------ prompts against the plain form
def plain_attention(block, normed, prompts):
    """Window by window, the prompts in front of its tokens, queries of the map only, pooled by maxima."""
    attn, (batch, height, width, _) = block.attn, normed.shape
    size = block.window_size if block.is_windowed else (height, width)
    stride = block.q_stride or (1, 1)
    padded = F.pad(normed, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    rows = []
    for strip in padded.split(size[0], 1):
        windows = []
        for window in strip.split(size[1], 2):
            tokens = torch.cat([prompts.expand(batch, -1, -1), window.flatten(1, 2)], 1)
            q, k, v = attn.qkv(tokens).view(batch, len(tokens[0]), 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q = q[:, :, prompts.shape[1] :].transpose(2, 3).reshape(batch, -1, *size)
            q = F.max_pool2d(q, stride, stride) if block.q_stride else q
            shape = q.shape[2:]
            q = q.view(batch, attn.num_heads, -1, shape[0] * shape[1]).transpose(2, 3)
            y = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1) @ v
            windows.append(attn.proj(y.transpose(1, 2).flatten(2)).view(batch, *shape, -1))
        rows.append(torch.cat(windows, 2))
    return torch.cat(rows, 1)[:, : height // stride[0], : width // stride[1]]


def plain_block(block, x, prompts):
    normed, residual = block.norm1(x), x
    if block.dim != block.dim_out:
        residual = block.proj(normed).permute(0, 3, 1, 2)
        residual = (F.max_pool2d(residual, 2, 2) if block.q_stride else residual).permute(0, 2, 3, 1)
    x = residual + block.ls1(plain_attention(block, normed, block.norm1(prompts)))
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (32, 32)), ({"init_values": 0.1, "q_pool": 1, "window_spec": (4, 3, 3)}, (32, 48))],
    ids=str,
)
def test_prompts_equal_the_plain_form(options, size):
    """The second network pads: windows of 3 on maps of 4 x 6, and widens its last stage without pooling."""
    model = adapted(tiny_hieradet(**options).double(), dl.VPTConfig(num_tokens=3))
    plain = tiny_hieradet(**options).double().requires_grad_(False)

    def run(x):
        x = plain._pos_embed(plain.patch_embed(x))
        for block, own in zip(model.blocks, plain.blocks, strict=True):
            x = plain_block(own, x, block.delta.live("attention.prompts")[0].embedding[None])
        return model.head.fc(plain.forward_head(x, pre_logits=True))

    x = images("swin", size=size).double()
    assert_same_run(model, run, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same_run(model, run, x)
    assert_merges(model, x, plain_class=False)


@pytest.mark.parametrize("q_pool", [2, 1])
def test_nothing_added_is_nothing_changed(q_pool):
    options = {"drop_path_rate": 0.5, "q_pool": q_pool, "window_spec": (4, 3, 3), "init_values": 0.1}
    for config in (dl.MonaConfig(bottleneck=4, init="identity", dropout=0.0), dl.LoRAConfig(r=2, parts=PARTS)):
        assert_untouched_by_zero(lambda: tiny_hieradet(**options), X, config)


def test_merging():
    x = X.double()
    assert_merges(adapted(tiny_hieradet().double(), dl.LoRAConfig(r=2, parts=PARTS)), x)
    model = adapted(tiny_hieradet(window_spec=(4, 3, 3)).double(), dl.RepAdapterConfig(bottleneck=4))
    assert_merges(model, x, plain_class=False)
    kept = [bool(block.delta.live("attention.pre")) for block in model.blocks]
    assert kept == [True, True, False, True]  # the third has global attention


def test_blocks_with_a_forward_of_their_own_are_unknown():
    class Other(MultiScaleBlock):
        def forward(self, x):
            return super().forward(x)

    model = tiny_hieradet()
    model.blocks[1].__class__ = Other
    families = [block.family for block in dl.describe(model).blocks()]
    assert families == [sam2.BLOCK, UNKNOWN_BLOCK, sam2.BLOCK, sam2.POOLING_BLOCK]


def test_the_published_network():
    with torch.device("meta"):
        model = timm.create_model("sam2_hiera_tiny")
    (tower,) = dl.describe(model).towers
    assert [block.width for block in tower.blocks] == [96] + [192] * 2 + [384] * 7 + [768] * 2
    assert [block.index for block in tower.blocks if block.family is sam2.POOLING_BLOCK] == [1, 3, 10]
    assert set(tower.blocks[1].parts) == {*PARTS, "expand"}
    assert tower.blocks[3].width_of("attention.pre") == 192
    assert tower.image_size == (896, 896)


@pytest.mark.slow
def test_compiled():
    configs = [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)]
    model = adapted(tiny_hieradet(stages=(1, 1), q_pool=1, window_spec=(4, 2), global_att_blocks=()), configs)
    compiled_equals_eager(model, X)


def test_half_precision_and_checkpointing():
    model = adapted(tiny_hieradet(), [dl.VPTConfig(num_tokens=2), dl.MonaConfig(bottleneck=4)])
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(X)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    model.set_grad_checkpointing(True)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
