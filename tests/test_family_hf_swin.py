"""transformers' Swin and Swin v2: prompts in windows, against timm's Swin and against attention written out."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hf_models import tiny
from matrix import LABELS, ROWS, export, refusal, walk
from models import randomize_adapter, tiny_swin

import deltalens as dl
from deltalens.sites.layout import Tokens

transformers = pytest.importorskip("transformers", "5.0")

NO_PATCHES, NO_FRAME = "VPT, patches of pixels", "VPT, frame of pixels"
LIVING = {"VPT-shallow", "VPT, 2 of the blocks", "VPT, added", "VPT, added to all"}
REFUSED = {
    "SwinForImageClassification": {NO_PATCHES, NO_FRAME},
    "Swinv2ForImageClassification": {NO_PATCHES} | LIVING,
}
CELLS = [(name, row) for name in REFUSED for row in ROWS]


def images(batch=2, size=32, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ------------------------------------------------------------------ the matrix
@pytest.mark.parametrize("name", REFUSED)
def test_refused_rows(name):
    for row in REFUSED[name]:
        message = refusal(lambda: tiny(name), row)
        assert message, row
        assert re.search("tokens.in|patch embedding|smallest map", message), message


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *[("SwinForImageClassification", row) for row in ("Mona", "VPT-shallow", "VPT-deep", "SSF")],
        *[("Swinv2ForImageClassification", row) for row in ("Mona", "VPT-deep", "LoRA on q, v")],
    ],
)
def test_walk(name, row, tmp_path):
    walk(lambda: tiny(name), images(len(LABELS), dtype=torch.float32), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), CELLS)
def test_full_walk(name, row, tmp_path):
    message = refusal(lambda: tiny(name), row)
    assert (message is not None) == (row in REFUSED[name]), message
    if message is None:
        x = images(len(LABELS), dtype=torch.float32)
        export(walk(lambda: tiny(name), x, row, tmp_path), x[:2])


# ------------------------------------------------------------------ against timm's Swin with the same weights
def from_timm(theirs):
    """A transformers Swin with the weights of timm's."""
    model = tiny("SwinForImageClassification").double()
    state, found = theirs.state_dict(), {}
    names = {
        "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
        "patch_embed.norm": "swin.embeddings.norm",
        "norm": "swin.layernorm",
        "head.fc": "classifier",
        "layers.1.downsample.norm": "swin.encoder.layers.0.downsample.norm",
        "layers.1.downsample.reduction": "swin.encoder.layers.0.downsample.reduction",
    }
    for i in range(2):
        for j in range(2):
            here, there = f"layers.{i}.blocks.{j}", f"swin.encoder.layers.{i}.blocks.{j}"
            names |= {
                f"{here}.norm1": f"{there}.layernorm_before",
                f"{here}.norm2": f"{there}.layernorm_after",
                f"{here}.attn.proj": f"{there}.attention.o_proj",
                f"{here}.mlp.fc1": f"{there}.mlp.fc1",
                f"{here}.mlp.fc2": f"{there}.mlp.fc2",
            }
            table = state[f"{here}.attn.relative_position_bias_table"]
            found[f"{there}.attention.relative_position_bias.relative_position_bias_table"] = table
            for kind in ("weight", "bias"):
                for part, rows in zip("qkv", state[f"{here}.attn.qkv.{kind}"].chunk(3), strict=True):
                    found[f"{there}.attention.{part}_proj.{kind}"] = rows
    for here, there in names.items():
        found |= {
            f"{there}.{kind}": state[f"{here}.{kind}"] for kind in ("weight", "bias") if f"{here}.{kind}" in state
        }
    model.load_state_dict(found)
    return model


@pytest.mark.parametrize(
    "config",
    [
        dl.VPTConfig(num_tokens=3),
        dl.VPTConfig(num_tokens=3, deep=False),
        dl.VPTConfig(num_tokens=3, deep=False, pool="prompts"),
        dl.VPTConfig(num_tokens=3, deep=False, pool="patches"),
        dl.MonaConfig(bottleneck=4),
        dl.AdapterConfig.houlsby(bottleneck=4),
        dl.AdaptFormerConfig(bottleneck=4),
    ],
    ids=["vpt-deep", "vpt-shallow", "pool prompts", "pool patches", "mona", "houlsby", "adaptformer"],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_same_as_timms_swin(config, implementation):
    theirs = tiny_swin().double()
    ours = from_timm(theirs)
    ours.set_attn_implementation(implementation)
    exact = {"atol": 1e-10 if implementation == "sdpa" else 1e-5, "rtol": 0}  # eager takes its softmax in float32
    torch.testing.assert_close(ours(images()).logits, theirs(images()), **exact)
    for model in (theirs, ours):
        randomize_adapter(dl.attach(model, config)).eval()
    own = [p for n, p in ours.named_parameters() if p.requires_grad and "delta" in n]
    other = [p for n, p in theirs.named_parameters() if p.requires_grad and "delta" in n]
    with torch.no_grad():
        for a, b in zip(own, other, strict=True):
            a.copy_(b)
        ours.classifier.load_state_dict(theirs.head.fc.state_dict())
    expected, found = theirs(images()), ours(images()).logits
    torch.testing.assert_close(found, expected, **exact)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **exact)


# ------------------------------------------------------------------ prompts as keys and values, written out
@pytest.mark.parametrize("size", [32, 40])
def test_swin_prompts_are_tokens_of_every_window(size):
    """Prompts are really put into the windows that the library's attention gets, and thrown away behind it."""
    model = tiny("SwinForImageClassification").double()
    plain = copy.deepcopy(model)
    dl.attach(model, dl.VPTConfig(num_tokens=3, depth=2, keep_prompts=False))
    randomize_adapter(model)
    plain.classifier.load_state_dict(model.classifier.state_dict())
    own = [p for n, p in model.named_parameters() if n.endswith("vpt.embedding")]
    copies = [p.detach().clone().requires_grad_() for p in own]
    for block, tokens in zip(plain.swin.encoder.layers[0].blocks, copies, strict=True):

        def put_in(module, args, block=block, tokens=tokens):
            windows, mask = args
            normed = block.layernorm_before(tokens).expand(len(windows), -1, -1)
            return torch.cat([normed, windows], 1), None if mask is None else F.pad(mask, (3, 0, 3, 0))

        block.attention.register_forward_pre_hook(put_in)
        block.attention.register_forward_hook(lambda module, args, y: (y[0][:, 3:], y[1]))
        block.attention.relative_position_bias.register_forward_hook(lambda m, a, bias: F.pad(bias, (3, 0, 3, 0)))
    expected, found = plain(images(size=size)).logits, model(images(size=size)).logits
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    expected[:, 0].sum().backward()
    found[:, 0].sum().backward()
    assert len(own) == 2
    for one, other in zip(own, copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=0)


def cosine_attention(attention, windows, prompts, mask):
    """Swin v2's attention of windows with prompts as tokens in front, whose own outputs are dropped."""
    tokens = torch.cat([prompts.expand(len(windows), -1, -1), windows], 1)
    area, p, heads = windows.shape[1], prompts.shape[1], attention.num_attention_heads

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    q, k, v = (split(layer(tokens)) for layer in (attention.query, attention.key, attention.value))
    scores = torch.einsum("bhqd,bhkd->bhqk", *(x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k)))
    scores = scores * torch.clamp(attention.logit_scale, max=math.log(100)).exp()
    table = attention.continuous_position_bias_mlp(attention.relative_coords_table).view(-1, heads)
    bias = 16 * torch.sigmoid(table[attention.relative_position_index.view(-1)].view(area, area, heads))
    scores[:, :, p:, p:] += bias.permute(2, 0, 1)
    if mask is not None:
        scores[:, :, p:, p:] += 2 * mask.repeat(len(windows) // len(mask), 1, 1)[:, None]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)[:, p:]


@pytest.mark.parametrize("size", [32, 40])
def test_swinv2_prompts_are_tokens_of_every_window(size):
    model = tiny("Swinv2ForImageClassification").double()
    plain = copy.deepcopy(model)
    dl.attach(model, dl.VPTConfig(num_tokens=3))
    randomize_adapter(model)
    plain.classifier.load_state_dict(model.classifier.state_dict())
    own = [p for n, p in model.named_parameters() if n.endswith("vpt.embedding")]
    copies = [p.detach().clone().requires_grad_() for p in own]
    blocks = [block for stage in plain.swinv2.encoder.layers for block in stage.blocks]
    for block, tokens in zip(blocks, copies, strict=True):

        def replaced(module, args, y, tokens=tokens):
            return (cosine_attention(module, args[0], tokens.unsqueeze(0), args[1]),)

        block.attention.self.register_forward_hook(replaced)
    expected, found = plain(images(size=size)).logits, model(images(size=size)).logits
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    expected[:, 0].sum().backward()
    found[:, 0].sum().backward()
    assert len(own) == 4
    for one, other in zip(own, copies, strict=True):
        assert one.grad.abs().max() > 1e-8
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=0)


def test_swinv2_block_is_post_norm():
    """inner modules act on what the norm gives, pre and parallel modules read x itself."""
    model = tiny("Swinv2ForImageClassification").double()
    methods = [dl.RepAdapterConfig(bottleneck=4), dl.AdapterConfig.houlsby(bottleneck=4)]
    randomize_adapter(dl.attach(model, [*methods, dl.AdaptFormerConfig(bottleneck=4)])).eval()
    block = dl.describe(model).blocks()[0].module
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    slots, layout = block.delta, Tokens(0, (4, 4))
    y, (found,) = x, block(x, (4, 4))
    attend = lambda n: block.layernorm_before(block.attention(n, None)[0])  # noqa: E731  (one window, no shift)
    mlp = lambda n: block.layernorm_after(block.output(block.intermediate(n)))  # noqa: E731
    for branch, body in (("attention", attend), ("mlp", mlp)):
        u = slots.chain(f"{branch}.inner", body(slots.chain(f"{branch}.pre", y, layout)), layout)
        delta, _ = slots.parallel(f"{branch}.parallel", y, y, layout)
        y = y + u + (0 if delta is None else delta)
    torch.testing.assert_close(found, y, atol=1e-10, rtol=0)


# ------------------------------------------------------------------ what the library's options do
def shapes(output):
    return {
        key: [tuple(x.shape) for x in value] if isinstance(value, (tuple, list)) else tuple(value.shape)
        for key, value in output.items()
        if value is not None
    }


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", ["SwinForImageClassification", "SwinModel", "SwinBackbone", "Swinv2Model"])
def test_recorded_states_hold_the_map_alone(name, deep):
    if name == "Swinv2Model" and not deep:
        pytest.skip("refused")
    model, x = tiny(name), images(dtype=torch.float32)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = shapes(model(x, **options))
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=deep))
    assert shapes(model(x, **options)) == expected
    assert isinstance(model(x, return_dict=False, **options), tuple)


def test_checkpointing_changes_nothing():
    for name in REFUSED:
        found = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = tiny(name).double()
            randomize_adapter(dl.attach(model, [dl.VPTConfig(num_tokens=3), dl.MonaConfig(bottleneck=4, dropout=0.0)]))
            if checkpointing:
                model.activation_checkpointing_enable()
            model.train()
            model(images()).logits.sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        for key, gradient in found[0].items():
            torch.testing.assert_close(found[1][key], gradient)


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_add_zero_change_nothing(name):
    model, x = tiny(name), images(dtype=torch.float32)
    with torch.no_grad():
        expected = model(x).logits
        dl.attach(model, dl.AdapterConfig(bottleneck=4, parallel=True))
        for key, parameter in model.named_parameters():
            if key.endswith(("up.weight", "up.bias")):
                parameter.zero_()
        assert torch.equal(model(x).logits, expected)
        dl.detach(model)
        assert torch.equal(model(x).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_compiles_as_one_graph(name):
    model, x = tiny(name), images(dtype=torch.float32)
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3))).eval()
    with torch.no_grad():
        expected = model(x).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(("cls", "config"), [("SwinModel", "SwinConfig"), ("Swinv2Model", "Swinv2Config")])
def test_published_architectures(cls, config):
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)())
    (tower,) = dl.describe(model).towers
    assert [block.width for block in tower.blocks] == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert tower.blocks[0].parts.keys() == {"q", "k", "v", "proj", "fc1", "fc2"}
    assert tower.blocks[0].grid == (56, 56)
