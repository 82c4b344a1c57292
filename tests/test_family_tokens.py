"""Families of token networks (ViT's blocks, Eva, Beit, relative positions): slots against plain forms in float64."""

import copy
import pickle

import pytest
import torch
from models import images, randomize_adapter
from torch import nn
from vit_zoo import BEITS, EVAS, RELPOS, VITS, with_tokens

import deltalens as dl
from deltalens.methods import Method

NETWORKS = VITS | EVAS | BEITS | RELPOS
QUICK = ("res-post", "parallel", "two of each", "eva-02 small", "dinov3", "beit, class token", "relpos, shared")
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def each(names, quick=QUICK):
    """Names as parameters; those that are not quick are slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def pair(name, **settings):
    """(network to adapt, plain network, images), in float64 and with the same weights."""
    return NETWORKS[name](**settings).double(), NETWORKS[name](**settings).double(), images("vit").double()


def scalar(output):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return (output * weights).sum()


# ------------------------------------------------------------------ prompts
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", each(NETWORKS, (*QUICK, "differential", "grouped queries, gate, qk-norm", "eva-02")))
def test_prompts_are_tokens(name, deep):
    model, plain, x = pair(name)
    dl.attach(model, dl.VPTConfig(num_tokens=2, deep=deep))
    randomize_adapter(model)
    slot = "attention.prompts" if deep else "tokens.in"
    blocks = model.blocks if deep else model.blocks[:1]
    prompts = [block.delta.live(slot)[0].embedding for block in blocks]
    plain.head = model.head
    with_tokens(plain, prompts, deep)
    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected, **EXACT)
    tensors = [*prompts, model.head.weight]
    found, expected = (torch.autograd.grad(scalar(output), tensors) for output in (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert all(gradient.abs().max() > 1e-6 for gradient in found)


@pytest.mark.parametrize("name", ["parallel, differential", "grouped queries, gate, qk-norm", "beit, shared"])
def test_either_kernel(name):
    """The fused attention kernel and the written one agree, with prompts and in the last block's class row."""
    model, _, x = pair(name)
    dl.attach(model, dl.VPTConfig(num_tokens=2))
    outputs = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, **EXACT)


@pytest.mark.parametrize("name", each(NETWORKS))
def test_prefixes_are_keys_and_values_of_the_right_shape(name):
    model, _, x = pair(name)
    before = model(x)
    dl.attach(model, dl.VPTConfig(num_tokens=2, location="prefix"))
    after = model(x)
    scalar(after).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert (after - before).abs().max() > 1e-6


# ------------------------------------------------------------------ every other slot
class Affine(nn.Module):
    """f(x) -> x W + b, or with two arguments x W + n V: order and arguments show."""

    pointwise = True

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, normed=None):
        return self.first(x) if normed is None else self.first(x) + self.second(normed)


class EverySlot(Method):
    name = "every_slot"

    def place(self, anatomy):
        for block in anatomy.blocks():
            for slot in sorted(block.family.slots):
                if not slot.startswith("tokens") and slot not in ("attention.prompts", "attention.mask"):
                    yield block, slot, Affine(block.width)


def branches_of(block):
    """[(norm of what is read, rest of the branch)] of a plain block, the rest with further arguments of the block."""

    def itself(x):
        return x

    if hasattr(block, "attns"):
        return [
            (itself, lambda n, **kw: sum(each.ls(each.attn(each.norm(n), **kw)) for each in block.attns)),
            (itself, lambda n, **kw: sum(each.ls(each.mlp(each.norm(n))) for each in block.ffns)),
        ]
    if type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock"):
        return [
            (itself, lambda n, **kw: block.norm1(block.attn(n, **kw))),
            (itself, lambda n, **kw: block.norm2(block.mlp(n))),
        ]
    first, second = (getattr(block, f"ls{i}", None) or _scale(getattr(block, f"gamma_{i}", None)) for i in (1, 2))
    return [
        (block.norm1, lambda n, **kw: first(block.attn(n, **kw))),
        (block.norm2, lambda n, **kw: second(block.mlp(n))),
    ]


def _scale(gamma):
    return lambda x: x if gamma is None else x * gamma


def written_out(block, live, x, **settings):
    start, first_normed = x, None
    for name, (norm, body) in zip(("attention", "mlp"), branches_of(block), strict=True):
        normed = norm(x)
        first_normed = normed if first_normed is None else first_normed
        update = live(f"{name}.inner")(body(live(f"{name}.pre")(normed), **settings))
        x = live(f"{name}.stream")(x + update + live(f"{name}.parallel")(x, normed))
    return live("block.stream")(x + live("block.parallel")(start, first_normed))


def _side_by_side(block, live, x, **settings):
    """ParallelScalingBlock with slots, from its own formula: one norm, two branches, one sum."""
    hidden, width = block.in_split[0], block.in_split[1]
    normed = block.in_norm(x)
    bias = block.in_proj.bias
    weight, bias = block.in_proj.weight, torch.zeros(len(block.in_proj.weight)).to(x) if bias is None else bias
    of_mlp = live("mlp.pre")(normed) @ weight[:hidden].T + bias[:hidden]
    of_mlp = of_mlp if block.mlp_bias is None else of_mlp + block.mlp_bias
    read = live("attention.pre")(normed)
    q, k, v = ((read @ w.T + b).unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
               for w, b in zip(weight[hidden:].split(width), bias[hidden:].split(width), strict=True))  # fmt: skip
    scores = block.q_norm(q) @ block.k_norm(k).mT * block.head_dim**-0.5
    attended = block.ls(block.attn_out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    update = live("attention.inner")(attended)
    update = update + live("mlp.inner")(block.ls(block.mlp_out_proj(block.mlp_act(of_mlp))))
    y = x + update + sum(live(slot)(x, normed) for slot in ("attention.parallel", "mlp.parallel", "block.parallel"))
    return live("block.stream")(y)


WRITTEN = [name for name in NETWORKS if "fused" not in name and name != "parallel, differential"]


@pytest.mark.parametrize("name", each(WRITTEN))
def test_every_slot_at_once(name):
    model, plain, x = pair(name)
    dl.attach(model, EverySlot())
    form = _side_by_side if name.startswith("parallel") else written_out
    for block, adapted in zip(plain.blocks, model.blocks, strict=True):
        live = {slot: adapted.delta.live(slot)[0] for slot in dl.describe(model).blocks()[0].family.slots
                if adapted.delta.live(slot)}  # fmt: skip
        block.forward = lambda x, block=block, live=live, **settings: form(block, live.__getitem__, x, **settings)
    plain.head = model.head
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    torch.testing.assert_close(model.forward_features(x), plain.forward_features(x), **EXACT)


# ------------------------------------------------------------------ the end
@pytest.mark.parametrize("name", each(NETWORKS))
def test_class_row_and_intermediates(name):
    """One row in the last block where the head reads one; added tokens never leave the model."""
    model, plain, x = pair(name)
    dl.attach(model, [dl.VPTConfig(num_tokens=2, deep=False), dl.LoRAConfig(r=2, parts=first_parts(model))])
    randomize_adapter(model)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), **EXACT)
    assert model.forward_features(x).shape == plain.forward_features(x).shape
    prefix = bool(model.num_prefix_tokens)
    for settings in ({"return_prefix_tokens": prefix}, {"output_fmt": "NLC", "norm": True, "indices": [0, 2]}):
        (final, maps), (plain_final, plain_maps) = (m.forward_intermediates(x, **settings) for m in (model, plain))
        assert final.shape == plain_final.shape
        for found, expected in zip(maps, plain_maps, strict=True):
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            assert all(one.shape == other.shape for one, other in pairs)
    torch.testing.assert_close(final, model.forward_features(x), **EXACT)


def first_parts(model):
    return [part for part in dl.describe(model).blocks()[0].parts if part.startswith(("v", "proj"))][:2]


POOLED = {"res-post, qk-norm, average", "registers without class token", "SwiGLU, map pool", "eva, average", "eva-02"}
POOLED |= {"perception encoder", "mixed, no class token", "beit", "beit, shared", "relpos", "relpos, shared"}
POOLED |= {"relpos, res-post"}
TOKEN_HEADS = [name for name in NETWORKS if name not in POOLED]


@pytest.mark.parametrize("name", each(TOKEN_HEADS))
def test_one_row_is_computed_for_a_class_token(name):
    model, _, x = pair(name)
    assert model.global_pool == "token"
    rows, last = [], model.blocks[-1]
    activation = next(m for path, m in last.named_modules() if path.endswith("act"))
    activation.register_forward_hook(lambda m, args, y: rows.append(y.shape[1]))
    dl.attach(model, dl.VPTConfig(num_tokens=2))
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), **EXACT)
    half = len(rows) // 2
    assert set(rows[:half]) == {1}
    assert set(rows[half:]) == {16 + model.num_prefix_tokens}


@pytest.mark.parametrize("name", each(NETWORKS))
@torch.no_grad()  # a bias that wants a gradient takes another attention kernel
def test_nothing_changes_bit_for_bit(name):
    """Adapters that add zero, and detaching; in the precision people use."""
    model, x = NETWORKS[name](), images("vit")
    before, output, features = copy.deepcopy(model.state_dict()), model(x), model.forward_features(x)
    dl.attach(model, [dl.ConvpassConfig(bottleneck=3), dl.LoRAConfig(r=2, parts=first_parts(model))])
    assert torch.equal(model.forward_features(x), features)
    assert torch.equal(pickle.loads(pickle.dumps(model)).forward_features(x), features)
    copied = copy.deepcopy(model)
    randomize_adapter(copied)
    assert not torch.equal(copied(x), output)
    assert torch.equal(model.forward_features(x), features)
    dl.detach(model)
    assert torch.equal(model(x), output)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.blocks[0]).__dict__.get("_families") is None


@pytest.mark.parametrize("name", each(NETWORKS))
def test_merged_equals_unmerged(name):
    x, parts = images("vit").double(), first_parts(NETWORKS[name]())
    for config in (
        [dl.SSFConfig(), dl.LoRAConfig(r=2, parts=parts)],
        [dl.RepAdapterConfig(bottleneck=4)],
        [dl.VPTConfig(num_tokens=2), dl.RepAdapterConfig(bottleneck=4)],
    ):
        model = NETWORKS[name]().double()
        dl.attach(model, config)
        randomize_adapter(model)
        expected = model.eval()(x)
        dl.merge_and_unload(model)
        torch.testing.assert_close(model(x), expected, **EXACT)


# ------------------------------------------------------------------ the forward as it is
@pytest.mark.parametrize("name", ["two of each", "dinov3", "beit, class token"])
def test_checkpointing_changes_nothing(name):
    model, _, x = pair(name)
    dl.attach(model, dl.VPTConfig(num_tokens=2))
    outputs = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        output = model.train()(x)
        outputs.append([output, *torch.autograd.grad(scalar(output), model.head.weight)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("config", [dl.VPTConfig(num_tokens=2, deep=False), dl.MonaConfig(bottleneck=4)])
def test_other_image_sizes(config):
    """Rotary embeddings are made for each image; the grid is that of the image."""
    model, plain = EVAS["dinov3"](), EVAS["dinov3"]()
    dl.attach(model, config)
    x = images("vit", size=(48, 32))
    assert model.forward_features(x).shape == plain.forward_features(x).shape
    assert model.forward_intermediates(x)[1][0].shape == (2, 24, 6, 4)
    scalar(model(x)).backward()


def test_patch_dropout_keeps_the_rotation_of_what_is_left():
    model, plain = (EVAS["eva-02 small"](patch_drop_rate=0.5).double() for _ in range(2))
    dl.attach(model, dl.LoRAConfig(r=2))
    x = images("vit").double()
    outputs = []
    for network in (model, plain):
        torch.manual_seed(5)
        network.train()
        network.patch_drop.train()
        outputs.append(network(x))
    torch.testing.assert_close(*outputs, **EXACT)


@pytest.mark.parametrize("name", ["eva-02 small", "differential", "beit"])
def test_bf16_autocast(name):
    model, x = NETWORKS[name](), images("vit")
    dl.attach(model, [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2), dl.MonaConfig(bottleneck=4)])
    randomize_adapter(model)
    expected = model.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        scalar(found).backward()
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("config", [dl.VPTConfig(num_tokens=2), dl.VPTConfig(num_tokens=2, deep=False), dl.SSFConfig()])
@pytest.mark.parametrize("name", [*QUICK, "grouped queries, gate, qk-norm", "mixed, no class token"])
def test_compile_and_export(name, config):
    model, x = NETWORKS[name](), images("vit")
    dl.attach(model, config)
    randomize_adapter(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    scalar(found).backward()
