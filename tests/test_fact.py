"""FacT: weight changes written out block by block, shared factors, merging, counts."""

import copy
import pickle

import pytest
import torch
from models import IMAGE_SIZE, MODELS, backward, images, randomize_adapter, tiny_swin, tiny_vit
from safetensors.torch import load_file
from test_counts import SWIN, VIT_B, count

import deltalens as dl
from deltalens.lifecycle.tensors import inserted_tensors

WIDTH, RANK, SCALE = 24, 3, 0.7


def adapted(form: str, **kwargs):
    config = dl.FacTConfig(r=RANK, form=form, scale=SCALE, dropout=0.0)
    return randomize_adapter(dl.attach(tiny_vit(**kwargs).double(), config)).eval()


def slices_of(tensors: dict, form: str, i: int) -> dict[str, list[torch.Tensor]]:
    """part -> its r x r matrices S for the C x C blocks of the part, in order. 12 slices a layer: q, k, v, proj, 4 of
    fc1, 4 of fc2."""
    sizes = {"q": 1, "k": 1, "v": 1, "proj": 1, "fc1": 4, "fc2": 4}
    names = {"q": "attn.qkv.q", "k": "attn.qkv.k", "v": "attn.qkv.v", "proj": "attn.proj.proj",
             "fc1": "mlp.fc1.fc1", "fc2": "mlp.fc2.fc2"}  # fmt: skip
    if form == "tt":
        own = {part: tensors[f"blocks.{i}.{name}.fact.S.weight"] for part, name in names.items()}
        return {part: own[part].split(RANK, dim=1 if part == "fc2" else 0) for part in own}
    (G,) = [t for name, t in tensors.items() if name.endswith("core.G")]
    (P,) = [t for name, t in tensors.items() if name.endswith("core.P")]
    found, first = {}, 12 * i
    for part, size in sizes.items():
        core = torch.einsum("abk,kj->abj", G, P[:, first : first + size])
        first += size
        if size == 1:
            found[part] = [core[..., 0].T]
            continue
        blocks = []
        for c in range(size):  # the official reshape: entry (a, flat) of (r, 4r), with flat = 4 b + j
            block = torch.stack([core[:, (c * RANK + m) // size, (c * RANK + m) % size] for m in range(RANK)], 1)
            blocks.append(block.T if part == "fc1" else block)
        found[part] = blocks
    return found


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_the_formula(form):
    """dW = s V S U on every C x C block of the weights of a plain model."""
    model = adapted(form)
    tensors = {name: t.detach().clone().requires_grad_() for name, t in inserted_tensors(model, "default").items()}
    (U,) = [t for name, t in tensors.items() if ".U." in name]
    (V,) = [t for name, t in tensors.items() if ".V." in name]
    plain, x = tiny_vit().double(), images("vit").double()
    plain.head.load_state_dict(model.head.state_dict())
    weights = dict(plain.named_parameters())
    for i in range(3):
        change = {
            part: torch.cat([SCALE * V @ S @ U for S in blocks], 1 if part == "fc2" else 0)
            for part, blocks in slices_of(tensors, form, i).items()
        }
        qkv = torch.cat([change["q"], change["k"], change["v"]])
        for name, delta in (("attn.qkv", qkv), ("attn.proj", change["proj"]),
                            ("mlp.fc1", change["fc1"]), ("mlp.fc2", change["fc2"])):  # fmt: skip
            weights[f"blocks.{i}.{name}.weight"] = weights[f"blocks.{i}.{name}.weight"] + delta
    expected = torch.func.functional_call(plain, weights, x)
    output, _ = backward(model, x)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).double()
    (expected * probe).sum().backward()
    for name, tensor in inserted_tensors(model, "default").items():
        torch.testing.assert_close(tensor.grad, tensors[name].grad, atol=1e-10, rtol=1e-8)


def test_counts_of_the_official_code():
    """Printed by the official scripts for ViT-B/16; the tt form also as in the paper's formula."""
    for rank, published in ((16, 61_440), (8, 21_504)):
        assert count(VIT_B, dl.FacTConfig(r=rank)).adapter == 2 * 768 * rank + 144 * rank**2 == published
    for rank, published in ((32, 86_528), (8, 13_952)):
        found = count(VIT_B, dl.FacTConfig(r=rank, form="tk")).adapter
        assert found == 2 * 768 * rank + 144 * rank + rank**3 == published
    attention_only = dl.FacTConfig(parts=("q", "k", "v", "proj"))
    assert count(VIT_B, attention_only).adapter == 2 * 768 * 16 + 48 * 16**2
    assert count(SWIN["t"], dl.FacTConfig()).adapter == 2 * 16 * (96 + 192 + 384 + 768) + 144 * 16**2


def test_factors_are_shared_by_layers_of_one_width(tmp_path):
    model = dl.attach(tiny_swin(), dl.FacTConfig(r=2))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        factors = {}
        for stage in range(2):
            for block in twin.layers[stage].blocks:
                for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                    factors.setdefault(stage, set()).update(id(module.U.weight) for *_, module in layer.delta.changes())
        assert [len(ids) for ids in factors.values()] == [1, 1]
        assert factors[0] != factors[1]
    dl.save_pretrained(randomize_adapter(model), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in names if ".U." in name] == [
        "layers.0.blocks.0.attn.qkv.q.fact.U.weight", "layers.1.blocks.0.attn.qkv.q.fact.U.weight"]  # fmt: skip
    assert torch.equal(dl.from_pretrained(tmp_path, tiny_swin())(images("swin")), model(images("swin")))


@pytest.mark.parametrize(("family", "form", "parts"), [
    ("vit", "tt", None), ("vit", "tk", None), ("vit", "tk", ("fc2", "v")), ("swin", "tt", None), ("swin", "tk", None),
    ("convnext", "tt", ("fc1", "fc2")), ("convnext", "tk", ("fc1", "fc2"))])  # fmt: skip
def test_merging(family, form, parts):
    config = dl.FacTConfig(r=RANK, form=form, scale=SCALE, **({} if parts is None else {"parts": parts}))
    plain = MODELS[family]()
    model = randomize_adapter(dl.attach(MODELS[family]().double(), config)).eval()
    x = torch.randn(2, 3, IMAGE_SIZE[family], IMAGE_SIZE[family], dtype=torch.float64)
    expected = model(x)
    with dl.disable_adapter(model):
        assert (model(x) - expected).abs().max() > 1e-3
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]


def test_start_and_dropout():
    model, x = tiny_vit(), images("vit")
    before = model(x)
    dl.attach(model, dl.FacTConfig(r=4, dropout=0.5))
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)  # V is zero
    randomize_adapter(model).train()
    assert (model(x) - model(x)).abs().max() > 1e-3
    model.eval()
    assert torch.equal(model(x), model(x))


def test_errors():
    for settings, message in (
        ({"r": 0}, "r must be at least 1"),
        ({"form": "cp"}, "form must be one of"),
        ({"parts": ("q", "w")}, "parts must be some of q, k"),
        ({"parts": ()}, "parts must be some of q, k"),
        ({"dropout": 1.0}, "dropout must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            dl.FacTConfig(**settings)
    with pytest.raises(ValueError, match=r"blocks of 24 x 24, and fc1 of blocks\.0 is 60 x 24; leave it out of parts"):
        dl.attach(tiny_vit(mlp_ratio=2.5), dl.FacTConfig())
    with pytest.raises(TypeError, match=r"FacT .*'weights:q', which ConvNeXtBlock"):
        dl.attach(MODELS["convnext"](), dl.FacTConfig())
