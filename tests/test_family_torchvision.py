"""torchvision's ViT, Swin 1 and 2, ConvNeXt and ResNet: every method, prompts, formulas, merging, published sizes."""

import copy
import functools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from library_models import (
    tiny_tv_convnext,
    tiny_tv_resnet,
    tiny_tv_swin,
    tiny_tv_swin_v2,
    tiny_tv_vit,
)
from matrix import LABELS, ROWS, export, refusal, walk
from models import assert_same, backward, images, randomize_adapter

import deltalens as dl

MODELS = {
    "vit": tiny_tv_vit,
    "swin": tiny_tv_swin,
    "swin_v2": tiny_tv_swin_v2,
    "convnext": tiny_tv_convnext,
    "resnet": tiny_tv_resnet,
}
VPT = {row for row in ROWS if row.startswith("VPT")} - {"VPT, image channels", "VPT, frame of pixels"}
WITH_PREFIX_OR_MAP = {"Adapter, parallel", "AdaptFormer", "Adapter-X", "LoRA on q, v", "FacT", "Convpass", "SCT"}
PEFT = {"DoRA of peft", "LoHa of peft"}
REFUSED = {
    "vit": {"VPT, frame of pixels"} | PEFT,
    "swin": {"VPT, patches of pixels"},
    "swin_v2": {"VPT, patches of pixels"},
    "convnext": VPT | WITH_PREFIX_OR_MAP,
    "resnet": VPT | WITH_PREFIX_OR_MAP | PEFT | {"LoRA on fc1, fc2", "RepAdapter"},
}
TRANSFORMER_ROWS = ("Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v", "Adapter, Houlsby", "SSF")
BY_DEFAULT = {
    "vit": TRANSFORMER_ROWS,
    "swin": ("Mona", "VPT-shallow"),
    "swin_v2": ("VPT-deep", "SSF"),
    "convnext": ("LoRA on fc1, fc2",),
    "resnet": ("Mona",),
}


def double_images(height=32, width=32):
    return images("vit", size=(height, width)).double()


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


@pytest.mark.parametrize("family", ["vit", "swin", "swin_v2", pytest.param("convnext", marks=pytest.mark.slow)])
def test_refusals(family):
    for row in REFUSED[family] - PEFT:
        message = refusal(MODELS[family], row)
        assert message is not None, row
        assert re.search(r"slot|patch embedding|takes 32x32 only", message), message


@pytest.mark.parametrize("family", MODELS)
def test_zero_adapters_leave_every_bit(family):
    """Modules in the block's slots that add zero; the whole stream is compared, not the class row only."""
    model, x = MODELS[family](), images("vit")
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=3))
        if family == "vit":
            model.encoder.register_forward_hook(lambda *_: None)  # hooks see all tokens: no class row only
        assert torch.equal(model.eval()(x), expected)
        dl.detach(model)
        assert torch.equal(model(x), expected)


def adapted(family):
    methods = [dl.MonaConfig(bottleneck=3), dl.SSFConfig()]
    methods += [dl.LoRAConfig(r=2)] * (family in ("vit", "swin", "swin_v2"))
    return randomize_adapter(dl.attach(MODELS[family](), methods)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_compile(family):
    model, x = adapted(family), images("vit")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", ["vit", *(pytest.param(each, marks=pytest.mark.slow) for each in ("swin", "swin_v2", "resnet"))]
)
def test_autocast_copies_pickle(family):
    model, x = adapted(family), images("vit")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.15 * expected.abs().max()


# ------------------------------------------------------------------ formulas
def vit_block(adapters, block, x):
    n = block.ln_1(x)
    x = x + adapters[0](block.dropout(block.self_attention(n, n, n, need_weights=False)[0]))
    return x + adapters[1](block.mlp(block.ln_2(x)))


def swin_block(adapters, block, x):
    x = x + adapters[0](block.attn(block.norm1(x)))
    return x + adapters[1](block.mlp(block.norm2(x)))


def swin_v2_block(adapters, block, x):
    x = x + adapters[0](block.norm1(block.attn(x)))
    return x + adapters[1](block.norm2(block.mlp(x)))


def convnext_block(adapters, block, x):
    u = block.layer_scale * block.block(x)
    return x + adapters[0](u.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def bottleneck_block(adapters, block, x):
    u = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))))
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(shortcut + adapters[0](u.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def basic_block(adapters, block, x):
    u = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(shortcut + adapters[0](u.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


FORMULAS = {
    "vit": (tiny_tv_vit, vit_block),
    "swin": (tiny_tv_swin, swin_block),
    "swin_v2": (tiny_tv_swin_v2, swin_v2_block),
    "convnext": (tiny_tv_convnext, convnext_block),
    "bottleneck": (tiny_tv_resnet, bottleneck_block),
    "basic": (functools.partial(tiny_tv_resnet, tv.resnet.BasicBlock), basic_block),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_adapters_on_branches(kind):
    """Against the block written by hand with the modules inserted."""
    make, formula = FORMULAS[kind]
    plain, model, x = make().double(), make().double(), double_images()
    randomize_adapter(dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=3)))
    for site in dl.describe(plain).blocks():
        slots = model.get_submodule(site.path).delta
        branches = ("attention.inner", "mlp.inner") if hasattr(slots, "attention_inner") else ("mlp.inner",)
        adapters = [slots.live(slot)[0] for slot in branches]
        site.module.forward = functools.partial(formula, adapters, site.module)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".delta." not in k})
    torch.testing.assert_close(model(x), plain(x), atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ prompts in the ViT
def vit_beside_prompts(model, prompts, x):
    """VPT-deep as published: prompts are tokens of the library's own blocks, thrown away behind each of them."""
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
    tokens = tokens + model.encoder.pos_embedding
    for block, prompt in zip(model.encoder.layers, prompts, strict=True):
        count = prompt.shape[1]
        tokens = block(torch.cat([tokens[:, :1], prompt.expand(len(x), -1, -1), tokens[:, 1:]], 1))
        tokens = torch.cat([tokens[:, :1], tokens[:, 1 + count :]], 1)
    return model.heads(model.encoder.ln(tokens)[:, 0])


def prompts_of(model):
    return [name for name, parameter in model.named_parameters() if name.endswith(".embedding")]


def test_vit_prompts_are_the_published_tokens():
    model, plain, x = tiny_tv_vit().double(), tiny_tv_vit().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3)))
    plain.heads.load_state_dict(model.heads.state_dict())
    found, grads = backward(model, x)
    names = prompts_of(model)
    prompts = [model.get_parameter(name)[None].detach().requires_grad_() for name in names]
    expected = vit_beside_prompts(plain, prompts, x)
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
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected.detach(), atol=1e-10, rtol=1e-10)


def test_vit_shallow_prompts_leave_before_the_norm():
    model, plain, x = tiny_tv_vit().double(), tiny_tv_vit().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False)))
    plain.heads.load_state_dict(model.heads.state_dict())
    prompt = model.get_parameter(prompts_of(model)[0]).detach()
    tokens = torch.cat([plain.class_token.expand(2, -1, -1), plain._process_input(x)], 1) + plain.encoder.pos_embedding
    tokens = torch.cat([tokens[:, :1], prompt.expand(2, -1, -1), tokens[:, 1:]], 1)
    for block in plain.encoder.layers:
        tokens = block(tokens)
    expected = plain.encoder.ln(torch.cat([tokens[:, :1], tokens[:, 4:]], 1))
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), plain.heads(expected[:, 0]), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(seen[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kwargs", [{}, {"representation_size": 7}], ids=["plain", "pre_logits"])
def test_vit_class_row_only(kwargs):
    """The short last block is taken, and gives what the whole one gives."""
    model, x = tiny_tv_vit(**kwargs).double(), double_images()
    randomize_adapter(dl.attach(model, [dl.LoRAConfig(r=2, parts=("q", "k", "v", "proj")), dl.VPTConfig(num_tokens=2)]))
    rows = []
    last = model.encoder.layers[-1]
    last.mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    short, grads = backward(model, x)
    handle = model.encoder.register_forward_hook(lambda *_: None)
    long, all_grads = backward(model, x)
    handle.remove()
    assert rows == [1, 17]
    torch.testing.assert_close(short, long, atol=1e-10, rtol=1e-10)
    assert_same(grads, all_grads, atol=1e-10, rtol=1e-10)


def test_vit_with_a_convolutional_stem():
    stem = [tv.vision_transformer.ConvStemConfig(8, 3, 2), tv.vision_transformer.ConvStemConfig(8, 3, 4)]
    model, x = tiny_tv_vit(conv_stem_configs=stem), images("vit")
    dl.attach(model, dl.MonaConfig(bottleneck=3))
    model(x).sum().backward()
    assert dl.describe(model).towers[0].layout.prefix == 1
    assert model.encoder.layers[0].delta.layout.grid == (4, 4)


def test_vit_pooling_of_prompts():
    model, x = tiny_tv_vit().double(), double_images()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False, pool="prompts")))
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(x)
    assert seen[0].shape[1] == 17 + 3
    torch.testing.assert_close(logits, model.heads(seen[0][:, 1:4].mean(1)), atol=1e-12, rtol=1e-12)
