"""open_clip's image towers, bare and inside CLIP; text towers beside them; ModifiedResNet; trunks of timm."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from library_models import (
    WithHead,
    tiny_oc_custom,
    tiny_oc_resnet,
    tiny_oc_visual,
)
from matrix import LABELS, ROWS, export, refusal, walk
from models import assert_same, backward, images, randomize, randomize_adapter

import deltalens as dl
from deltalens.sites.swap import Swapped

MODELS = {
    "vit": lambda: WithHead(tiny_oc_visual()),
    "custom": lambda: WithHead(tiny_oc_custom()),
    "resnet": lambda: WithHead(tiny_oc_resnet()),
}
ONE_SIZE = {"VPT, frame of pixels", "Sidetune"}
PEFT = {"DoRA of peft", "LoHa of peft"}
CONVOLUTIONAL = {row for row in ROWS if row.startswith("VPT")} - {"VPT, image channels"}
CONVOLUTIONAL |= {"Adapter, parallel", "AdaptFormer", "Adapter-X", "FacT", "Convpass", "SCT", "RepAdapter"}
CONVOLUTIONAL |= {"LoRA on q, v", "LoRA on fc1, fc2"}
REFUSED = {"vit": ONE_SIZE | PEFT, "custom": ONE_SIZE | PEFT, "resnet": CONVOLUTIONAL | PEFT | {"Sidetune"}}
TRANSFORMER_ROWS = ("Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v", "Adapter, Houlsby", "SSF")
BY_DEFAULT = {"vit": TRANSFORMER_ROWS, "custom": ("SSF",), "resnet": ("Mona",)}


def double_images():
    return images("vit").double()


def no_class_row_only(visual):
    """Hooks see all tokens, so that the last block computes them."""
    visual.transformer.register_forward_hook(lambda *_: None)
    return visual


# ------------------------------------------------------------------ every method
@pytest.mark.parametrize(("family", "row"), [(family, row) for family, rows in BY_DEFAULT.items() for row in rows])
def test_walk(family, row, tmp_path):
    walk(MODELS[family], images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "row"), [(family, row) for family in MODELS for row in ROWS])
def test_every_row(family, row, tmp_path):
    message = refusal(MODELS[family], row)
    assert (message is not None) == (row in REFUSED[family]), message
    if message is None:
        walk(MODELS[family], images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_export(family):
    export(adapted(family), images("vit"))


@pytest.mark.parametrize("family", ["vit", "custom"])
def test_refusals(family):
    for row in REFUSED[family] - PEFT:
        message = refusal(MODELS[family], row)
        assert message is not None, row
        assert re.search(r"slot|takes 32x32 only|no such place", message), message


@pytest.mark.parametrize("family", MODELS)
def test_zero_adapters_leave_every_bit(family):
    model, x = MODELS[family](), images("vit")
    if family != "resnet":
        no_class_row_only(model.visual)
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=3))
        assert torch.equal(model.eval()(x), expected)
        dl.detach(model)
        assert torch.equal(model(x), expected)


def adapted(family):
    methods = [dl.MonaConfig(bottleneck=3), dl.SSFConfig()] + [dl.LoRAConfig(r=2)] * (family != "resnet")
    return randomize_adapter(dl.attach(MODELS[family](), methods)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_compile(family):
    model, x = adapted(family), images("vit")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", ["custom", *(pytest.param(each, marks=pytest.mark.slow) for each in ("vit", "resnet"))]
)
def test_autocast_copies_pickle(family):
    model, x = adapted(family), images("vit")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.15 * expected.abs().max()


# ------------------------------------------------------------------ the bare tower
def beside_prompts(visual, prompts, x):
    """VPT-deep as published: prompts are tokens of the library's own blocks, thrown away behind each of them."""
    tokens = visual._embeds(x)
    for block, prompt in zip(visual.transformer.resblocks, prompts, strict=True):
        count = prompt.shape[1]
        tokens = block(torch.cat([tokens[:, :1], prompt.expand(len(x), -1, -1), tokens[:, 1:]], 1))
        tokens = torch.cat([tokens[:, :1], tokens[:, 1 + count :]], 1)
    features, _ = visual._pool(tokens)
    return features @ visual.proj


def prompts_of(model):
    return [name for name, _ in model.named_parameters() if name.endswith(".embedding")]


VARIANTS = {
    "LayerScale": tiny_oc_visual,
    "no LayerScale, no first norm": lambda: tiny_oc_visual(ls_init_value=None, no_ln_pre=True),
    "mean": lambda: tiny_oc_visual(pool_type="avg"),
    "norm after pooling": lambda: tiny_oc_visual(pool_type="avg", final_ln_after_pool=True),
    "attentional pooling": lambda: tiny_oc_visual(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
    "custom": tiny_oc_custom,
    "custom, scaled heads only": lambda: tiny_oc_visual(scale_heads=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_the_published_tokens(variant):
    model, plain, x = VARIANTS[variant]().double(), VARIANTS[variant]().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3)))
    found, grads = backward(model, x)
    names = prompts_of(model)
    prompts = [model.get_parameter(name)[None].detach().requires_grad_() for name in names]
    expected = beside_prompts(plain, prompts, x)
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=1e-10)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).double()
    (expected * weights).sum().backward()
    assert len(prompts) == 3
    assert_same(
        {name: grads[name] for name in names},
        {name: prompt.grad[0] for name, prompt in zip(names, prompts, strict=True)},
        atol=1e-10,
        rtol=1e-10,
    )
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected.detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_prompts_never_leave(variant):
    """Neither through pooling nor through forward_intermediates."""
    model, plain, x = VARIANTS[variant]().double(), VARIANTS[variant]().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False)))
    prompt = model.get_parameter(prompts_of(model)[0]).detach()
    tokens, taps = plain._embeds(x), []
    tokens = torch.cat([tokens[:, :1], prompt.expand(2, -1, -1), tokens[:, 1:]], 1)
    for block in plain.transformer.resblocks:
        tokens = block(tokens)
        taps.append(torch.cat([tokens[:, :1], tokens[:, 4:]], 1))
    features = plain._pool(taps[-1])[0] @ plain.proj
    torch.testing.assert_close(model(x), features, atol=1e-10, rtol=1e-10)

    found = model.forward_intermediates(x, indices=[0, 2], output_extra_tokens=True)
    torch.testing.assert_close(found["image_features"], features, atol=1e-10, rtol=1e-10)
    for tap, feature_map, prefix in zip(
        [taps[0], taps[2]], found["image_intermediates"], found["image_intermediates_prefix"], strict=True
    ):
        torch.testing.assert_close(feature_map, tap[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), atol=1e-10, rtol=0)
        torch.testing.assert_close(prefix, tap[:, :1], atol=1e-10, rtol=0)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NLC")
    torch.testing.assert_close(early["image_intermediates"][0], taps[0][:, 1:], atol=1e-10, rtol=0)
    torch.testing.assert_close(early["image_features"], plain._pool(taps[0])[0] @ plain.proj, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"normalize_intermediates": True}, {"intermediates_only": True}])
def test_forward_intermediates_is_the_library_s(options):
    model, x = tiny_oc_visual(), images("vit")
    for fmt in ("NCHW", "NLC"):
        settings = {"indices": 2, "output_fmt": fmt, "output_extra_tokens": True, **options}
        with torch.no_grad():
            expected = tiny_oc_visual().forward_intermediates(x, **settings)
            dl.attach(model, dl.AdapterConfig(bottleneck=2), name=fmt)
            found = model.eval().forward_intermediates(x, **settings)
        assert found.keys() == expected.keys()
        for key in expected:
            together = zip(found[key], expected[key], strict=True)
            assert all(torch.equal(a, b) for a, b in together), key


@pytest.mark.parametrize("make", [tiny_oc_visual, tiny_oc_custom])
def test_class_row_only(make):
    """The short last block is taken, with checkpointing or without, and gives what the whole one gives."""
    model, x = make().double(), double_images()
    randomize_adapter(dl.attach(model, [dl.LoRAConfig(r=2, parts=("q", "k", "v", "proj")), dl.VPTConfig(num_tokens=2)]))
    rows = []
    model.transformer.resblocks[-1].mlp.register_forward_hook(lambda module, args, y: rows.append(y.shape[1]))
    short, grads = backward(model, x)
    no_class_row_only(model)
    long, all_grads = backward(model, x)
    assert rows == [1, 17]
    torch.testing.assert_close(short, long, atol=1e-10, rtol=1e-10)
    assert_same(grads, all_grads, atol=1e-10, rtol=1e-10)


def test_checkpointing():
    model, x = tiny_oc_visual().double(), double_images()
    randomize_adapter(dl.attach(model, [dl.LoRAConfig(r=2), dl.MonaConfig(bottleneck=3)]))
    expected, grads = backward(model, x)
    model.set_grad_checkpointing(True)
    for short in (True, False):
        if not short:
            no_class_row_only(model)
        found, again = backward(model, x)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        assert_same(again, grads, atol=1e-10, rtol=1e-10)


def test_a_tower_that_returns_tokens():
    model, x = tiny_oc_visual(output_tokens=True).double(), double_images()
    expected = model(x)
    dl.attach(model, dl.LoRAConfig(r=2))
    for found, plain in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-12)
    assert model(x)[1].shape == (2, 16, 24)


def test_patch_dropout_stays_the_backbone_s():
    """LoRA holds the frozen tower in eval mode; a method with maps says what is wrong where tokens are dropped."""
    model = tiny_oc_visual(patch_dropout=0.5)
    dl.attach(model, dl.LoRAConfig(r=2)).train()
    assert torch.equal(model(images("vit")), model(images("vit")))
    model = dl.attach(tiny_oc_visual(patch_dropout=0.5), dl.MonaConfig(bottleneck=3)).train()
    with pytest.raises(RuntimeError, match="patch dropout"):
        model(images("vit"))


def test_pooling_of_prompts():
    model, plain, x = tiny_oc_visual().double(), tiny_oc_visual().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False, pool="prompts")))
    prompt = model.get_parameter(prompts_of(model)[0]).detach()
    tokens = plain._embeds(x)
    tokens = torch.cat([tokens[:, :1], prompt.expand(2, -1, -1), tokens[:, 1:]], 1)
    for block in plain.transformer.resblocks:
        tokens = block(tokens)
    expected = plain.ln_post(tokens)[:, 1:4].mean(1) @ plain.proj
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    with pytest.raises(TypeError, match="has none"):
        dl.attach(VARIANTS["attentional pooling"](), dl.VPTConfig(num_tokens=3, pool="cls"))


def test_streams_with_the_batch_second():
    """open_clip's Transformer runs in (N, B, C) where batch_first is off; slots see (B, N, C)."""

    def make():
        model = tiny_oc_visual()
        model.transformer.batch_first = False
        for block in model.transformer.resblocks:
            block.attn.batch_first = False
        return model.double()

    first, second, x = tiny_oc_visual().double(), make(), double_images()
    for methods in ([dl.MonaConfig(bottleneck=3), dl.VPTConfig(num_tokens=2)], [dl.VPTConfig(2, deep=False)]):
        towers = [dl.attach(m, methods) for m in (copy.deepcopy(first), copy.deepcopy(second))]
        for tower in towers:
            randomize(tower).eval()
        torch.testing.assert_close(towers[1](x), towers[0](x), atol=1e-10, rtol=1e-10)
        taps = [tower.forward_intermediates(x, indices=1)["image_intermediates"][0] for tower in towers]
        torch.testing.assert_close(taps[1], taps[0], atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ formulas and merging
@pytest.mark.parametrize("make", [tiny_oc_visual, tiny_oc_custom, tiny_oc_resnet])
def test_adapters_on_branches(make):
    """Against the block written by hand with the modules inserted."""
    plain, model, x = make().double(), make().double(), double_images()
    randomize_adapter(dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=3)))

    def formula(block, slots, x):
        if make is tiny_oc_resnet:
            u = block.avgpool(F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))))
            u = slots.live("mlp.inner")[0](block.bn3(block.conv3(u)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return F.relu(u + (x if block.downsample is None else block.downsample(x)))
        n = block.ln_1(x)
        update = block.attn(n, n, n)[0] if make is tiny_oc_visual else block.ln_attn(block.attn(n))
        x = x + slots.live("attention.inner")[0](block.ls_1(update))
        return x + slots.live("mlp.inner")[0](block.ls_2(block.mlp(block.ln_2(x))))

    for site in dl.describe(plain).blocks():
        slots = model.get_submodule(site.path).delta
        site.module.forward = lambda x, *_, block=site.module, slots=slots, **__: formula(block, slots, x)
    torch.testing.assert_close(model(x), plain(x), atol=1e-10, rtol=1e-10)


MERGED = {
    "LoRA": dl.LoRAConfig(r=2, parts=("q", "k", "v", "proj", "fc1", "fc2")),
    "SSF": dl.SSFConfig(),
    "FacT": dl.FacTConfig(r=2, parts=("q", "k", "v", "proj"), dropout=0.0),
    "RepAdapter": dl.RepAdapterConfig(bottleneck=4, dropout=0.0),
    "LoRA by name": dl.LoRAConfig(r=2, target_modules=("q_proj", "k_proj", "v_proj", "c_proj")),
}
MERGES = [(make, method) for make in (tiny_oc_visual, tiny_oc_custom) for method in list(MERGED)[:4]]


@pytest.mark.parametrize(("make", "method"), [*MERGES, (tiny_oc_resnet, "SSF"), (tiny_oc_resnet, "LoRA by name")])
def test_merging(make, method):
    model, x = make().double(), double_images()
    plain = model(x)
    randomize_adapter(dl.attach(model, MERGED[method])).eval()
    expected = model(x)
    assert (expected - plain).abs().max() > 1e-3
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-9, rtol=1e-9)
    assert not any(isinstance(module, Swapped) for module in merged.modules())


def test_the_pooling_attention_as_read_is_the_library_s():
    """LoRA of zero sends the forward through our reading; peft's would do nothing in any of the four layers."""
    model, x = tiny_oc_resnet().double(), double_images()
    expected = model(x)
    dl.attach(model, MERGED["LoRA by name"])
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    randomize_adapter(model)
    model(x).sum().backward()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(trained) == 8
    assert all(p.grad.abs().max() > 0 for p in trained)
