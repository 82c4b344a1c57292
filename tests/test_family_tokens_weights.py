"""Layers whose biases their attention keeps apart (Eva, Beit), distilled heads, hybrids, published architectures."""

import pytest
import timm
import torch
from matrix import LABELS, ROWS, refusal, walk
from models import images, randomize_adapter
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from vit_zoo import BEITS, EVAS, RELPOS, VITS, tiny, tiny_distilled, with_tokens

import deltalens as dl

EXACT = {"atol": 1e-10, "rtol": 1e-10}
SPLICED = {"eva": EVAS["eva"], "eva-02 small": EVAS["eva-02 small"], "beit": BEITS["beit"]}


# ------------------------------------------------------------------ biases beside the layer
def qkv_modules(model):
    return [block.attn.qkv.delta.changes() for block in model.blocks]


@pytest.mark.parametrize("name", SPLICED)
def test_lora_acts_on_a_layer_whose_weight_is_read(name):
    model, plain, x = SPLICED[name]().double(), SPLICED[name]().double(), images("vit").double()
    dl.attach(model, dl.LoRAConfig(r=2, parts=("q", "v")))
    randomize_adapter(model)
    for block, changes in zip(plain.blocks, qkv_modules(model), strict=True):
        assert [change[:2] for change in changes] == [(0, 24), (48, 72)]
        for start, stop, module in changes:
            block.attn.qkv.weight.data[start:stop] += module.weight_change().detach()
    plain.head = model.head
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    names = list(SPLICED[name]().state_dict())
    dl.merge_and_unload(model)
    assert list(model.state_dict()) == names  # biases stay where the backbone has them
    torch.testing.assert_close(model(x), plain(x), **EXACT)


@pytest.mark.parametrize("name", SPLICED)
def test_ssf_scales_the_biases_too(name):
    model, plain, x = SPLICED[name]().double(), SPLICED[name]().double(), images("vit").double()
    dl.attach(model, dl.LoRAConfig(r=2, parts=("fc2",)))  # something that leaves qkv alone
    dl.attach(model, [dl.SSFConfig(exclude=r"(?!blocks\.\d+\.attn\.qkv$).*")], name="ssf")
    randomize_adapter(model)
    for block, changes in zip(plain.blocks, qkv_modules(model), strict=True):
        ((_, _, module),) = changes
        attn, (scale, shift) = block.attn, (module.scale.detach(), module.shift.detach())
        attn.qkv.weight.data *= scale[:, None]
        for bias, own_scale, own_shift in zip((attn.q_bias, attn.k_bias, attn.v_bias), scale.split(24),
                                              shift.split(24), strict=True):  # fmt: skip
            bias.data.mul_(own_scale).add_(own_shift)
    plain.head = model.head
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    dl.merge_and_unload(model)
    assert type(model.blocks[0].attn) is type(plain.blocks[0].attn)
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    assert not any("delta" in path.split(".") for path, _ in model.named_modules())


@pytest.mark.parametrize("name", ["eva", "beit"])
def test_peft_wrappers_act_on_it(name):
    model, x = SPLICED[name](), images("vit")
    before = model(x)
    dl.attach(model, dl.make_config("peft/loha", r=2, target_modules=r"blocks\.\d+\.attn\.qkv"))
    randomize_adapter(model)
    model.head.requires_grad_(False)
    after = model(x)
    after.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    dl.detach(model)
    assert torch.equal(model(x), before)


# ------------------------------------------------------------------ two heads, two prefix tokens
@pytest.mark.parametrize("deep", [True, False])
def test_distilled(deep):
    model, plain, x = tiny_distilled().double(), tiny_distilled().double(), images("vit").double()
    dl.attach(model, dl.VPTConfig(num_tokens=2, deep=deep))
    randomize_adapter(model)
    (tower,) = dl.describe(model).towers
    assert (tower.layout.prefix, tower.class_token, tower.classifier) == (2, True, None)
    blocks = model.blocks if deep else model.blocks[:1]
    slot = "attention.prompts" if deep else "tokens.in"
    with_tokens(plain, [block.delta.live(slot)[0].embedding for block in blocks], deep)
    plain.head, plain.head_dist = model.head, model.head_dist
    rows = []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    assert rows == [2]
    for network in (model, plain):
        network.train().set_distilled_training(True)
    for found, expected in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_slots_around_two_heads_are_not_offered():
    for config in (dl.SidetuneConfig(pretrained=False), dl.VPTConfig(num_tokens=2, pool="patches")):
        with pytest.raises(TypeError, match=r"VisionTransformerDistilled"):
            dl.attach(tiny_distilled(), config)


# ------------------------------------------------------------------ a ResNet before the ViT
def hybrid(**settings):
    def embed(*args, patch_size, **kwargs):
        network = timm.create_model("test_resnet", features_only=True, out_indices=(2,))
        return HybridEmbed(network.eval(), *args, patch_size=1, **kwargs)

    return tiny(VisionTransformer, embed_layer=embed, **settings)


def test_hybrids_have_one_tower():
    model = hybrid()
    (tower,) = dl.describe(model).towers
    assert [block.path for block in tower.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert (tower.stem.path, tower.image.path) == ("patch_embed.backbone.conv1.0", "patch_embed")
    x = images("vit")
    before = model(x)
    dl.attach(model, [dl.MonaConfig(bottleneck=4), dl.VPTConfig(location="concat-channel", num_tokens=2, deep=False)])
    randomize_adapter(model)
    after = model(x)
    after.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (after - before).abs().max() > 1e-4
    dl.detach(model)
    assert torch.equal(model(x), before)


# ------------------------------------------------------------------ published architectures
PUBLISHED = {  # name: (family, blocks, width, prefix tokens, parts of the MLP)
    "vit_relpos_small_patch16_rpn_224": ("relpos:RES_POST", 12, 384, 0, {"fc1", "fc2"}),
    "vit_srelpos_small_patch16_224": ("relpos:BLOCK", 12, 384, 0, {"fc1", "fc2"}),
    "vit_base_patch16_xp_224": ("vit_parallel:SCALING", 12, 768, 1, {"fc1", "fc2"}),
    "vit_small_patch16_36x1_224": ("vit:BLOCK", 36, 384, 1, {"fc1", "fc2"}),
    "vit_small_patch16_18x2_224": ("vit:THINGS", 18, 384, 1, {"fc1_1", "fc2_1", "fc1_2", "fc2_2"}),
    "vit_small_patch14_reg4_dinov2": ("vit:BLOCK", 12, 384, 5, {"fc1", "fc2"}),
    "vit_little_patch16_reg1_gap_256": ("vit:BLOCK", 14, 320, 1, {"fc1", "fc2"}),
    "deit_tiny_distilled_patch16_224": ("vit:BLOCK", 12, 192, 2, {"fc1", "fc2"}),
    "deit3_small_patch16_224": ("vit:BLOCK", 12, 384, 1, {"fc1", "fc2"}),
    "vit_tiny_r_s16_p8_224": ("vit:BLOCK", 12, 192, 1, {"fc1", "fc2"}),
    "eva02_tiny_patch14_224": ("eva:BLOCK", 12, 192, 1, {"fc1", "fc2"}),
    "eva02_base_patch16_clip_224": ("eva:BLOCK", 12, 768, 1, {"fc1_g", "fc1_x", "fc2"}),
    "eva02_enormous_patch14_clip_224": ("eva:POST_NORM", 64, 1792, 1, {"fc1", "fc2"}),
    "vit_small_patch16_dinov3": ("eva:BLOCK", 12, 384, 5, {"fc1", "fc2"}),
    "vit_small_plus_patch16_dinov3": ("eva:BLOCK", 12, 384, 5, {"fc1_g", "fc1_x", "fc2"}),
    "vit_pe_core_tiny_patch16_384": ("eva:BLOCK", 12, 192, 1, {"fc1", "fc2"}),
    "vit_pe_spatial_gigantic_patch14_448": ("eva:BLOCK", 50, 1536, 0, {"fc1", "fc2"}),
    "beit_base_patch16_224": ("beit:BLOCK", 12, 768, 1, {"fc1", "fc2"}),
    "beitv2_large_patch16_224": ("beit:BLOCK", 24, 1024, 1, {"fc1", "fc2"}),
    "samvit_base_patch16": ("sam:BLOCK", 12, 768, 0, {"fc1", "fc2"}),
}
FEW_PUBLISHED = ("vit_base_patch16_xp_224", "eva02_base_patch16_clip_224", "beit_base_patch16_224")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW_PUBLISHED else pytest.mark.slow) for name in PUBLISHED]
)
def test_published_architectures(name):
    family, count, width, prefix, mlp = PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    (tower,) = dl.describe(model).towers
    assert {block.family.name for block in tower.blocks} == {f"deltalens.backbones.timm.{family}"}
    assert (len(tower.blocks), {block.width for block in tower.blocks}) == (count, {width})
    assert tower.layout.prefix == prefix
    parts = tower.blocks[0].parts
    assert {part for part in parts if part.startswith("fc")} == mlp
    for part in parts.values():
        layer = tower.blocks[0].module.get_submodule(part.path)
        assert isinstance(layer, torch.nn.Linear)
        assert part.rows is None or part.rows[1] <= layer.out_features
    qkv = [part for name, part in parts.items() if name.rstrip("12") in ("q", "k", "v")]
    assert all(part.rows is None or part.rows[1] - part.rows[0] == width for part in qkv)


# ------------------------------------------------------------------ every method
ROWS_OF = {
    "eva-02 small": (EVAS["eva-02 small"], {"VPT, frame of pixels"}),
    "dinov3": (EVAS["dinov3"], set()),
    "post-norm": (EVAS["post-norm"], {"VPT, frame of pixels"}),
    "eva-02": (EVAS["eva-02"], {"VPT, frame of pixels", "LoRA on fc1, fc2", "FacT"}),
    "beit": (BEITS["beit"], {"VPT, frame of pixels"}),
    "relpos": (RELPOS["relpos, class token, table"], {"VPT, frame of pixels"}),
    "res-post": (VITS["res-post"], {"VPT, frame of pixels"}),
    "parallel": (VITS["parallel"], {"VPT, frame of pixels", "SCT"}),
    "parallel, fused": (VITS["parallel, fused"], {"VPT, frame of pixels", "SCT", "LoRA on fc1, fc2", "FacT"}),
    "two of each": (
        VITS["two of each"],
        {"VPT, frame of pixels", "LoRA on q, v", "LoRA on fc1, fc2", "FacT", "DoRA of peft", "LoHa of peft"},
    ),
    "differential": (VITS["differential"], {"VPT, frame of pixels"}),
    "distilled": (tiny_distilled, {"VPT, frame of pixels", "Sidetune"}),
}
FEW = [
    ("eva-02 small", "Mona"),
    ("beit", "VPT-shallow"),
    ("dinov3", "VPT-deep"),
    ("parallel", "Adapter, Houlsby"),
    ("eva-02 small", "LoRA on q, v"),
    ("post-norm", "SSF"),
]


@pytest.mark.parametrize(("network", "row"), FEW)
def test_few_rows(network, row, tmp_path):
    walk(ROWS_OF[network][0], images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("network", ROWS_OF)
def test_all_rows(network, row, tmp_path):
    make, refused = ROWS_OF[network]
    message = refusal(make, row)
    assert (message is not None) == (row in refused), message
    if message is None:
        walk(make, images("vit", batch=len(LABELS)), row, tmp_path)
