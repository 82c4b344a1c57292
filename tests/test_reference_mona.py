"""Mona and its LoRA baseline against the published implementations."""

import json

import pytest
import reference
import torch
from timm.models.swin_transformer import SwinTransformer

import deltalens as dl
from deltalens.methods.lora import LoRALayer

LAYERS = ["mona_d96_h7w12", "mona_d96_h14w14", "mona_d192_h7w12", "mona_d192_h14w14"]
TOLERANCE = {torch.float64: ("_f64", 1e-9, 1e-10), torch.float32: ("", 1e-4, 1e-3)}


def close(found, expected, dtype):
    _, rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, memory, dtype):
    tensors, meta = reference.load(name)
    height, width, dim, suffix = int(meta["H"]), int(meta["W"]), int(meta["dim"]), TOLERANCE[dtype][0]
    layer = dl.MonaLayer(dim, int(meta["inner"]), memory=memory).to(dtype).eval()
    layer.load_state_dict(reference.sub(tensors, "param."))
    x = tensors["input"].to(dtype).requires_grad_()
    y = layer(x.unflatten(1, (height, width))).flatten(1, 2)
    close(y, tensors[f"output{suffix}"], dtype)
    (y * tensors["cotangent"].to(dtype)).sum().backward()
    close(x.grad, tensors[f"grad{suffix}.input"], dtype)
    for path, parameter in layer.named_parameters():
        close(parameter.grad, tensors[f"grad{suffix}.{path}"], dtype)
    assert sum(p.numel() for p in layer.parameters()) == int(meta["n_params"]) == 133 * dim + 9728


def swin_with_mona(dtype):
    tensors, meta = reference.load("swin_mona_model_n64")
    state = reference.sub(tensors, "state.")
    model = SwinTransformer(**json.loads(meta["config"]))
    adapter = {key: tensor for key, tensor in state.items() if ".mona_" in key}
    model.load_state_dict({key: tensor for key, tensor in state.items() if key not in adapter})
    dl.attach(model, dl.MonaConfig(bottleneck=int(meta["inner"])))
    return model.to(dtype).eval(), tensors, adapter, meta


@pytest.mark.parametrize("official", ["mona_attn/mona_mlp", "my_module_1/my_module_2", "mona1/mona2"])
def test_swin_model(official):
    dtype = torch.float64
    model, tensors, adapter, meta = swin_with_mona(dtype)
    first, second = official.split("/")
    named = {f"backbone.{k.replace('mona_attn', first).replace('mona_mlp', second)}": v for k, v in adapter.items()}
    loaded, ignored = dl.import_official(model, {**named, "backbone.norm0.weight": torch.ones(24)}, source="mona")
    assert (loaded, ignored) == (len(adapter), 1)
    blocks = {}
    for path, block in model.named_modules():
        if path.count(".") == 3 and ".blocks." in path:
            block.register_forward_hook(lambda module, args, y, path=path: blocks.update({path: y}))
    x = tensors["input"].to(dtype).requires_grad_()
    logits = model(x)
    for path, output in blocks.items():
        close(output, tensors[f"block_out_f64.{path}"], dtype)
    close(logits, tensors["logits_f64"], dtype)
    (logits * tensors["cotangent"].to(dtype)).sum().backward()
    close(x.grad, tensors["grad_f64.input"], dtype)
    trained = 0
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            published = path.replace("delta.attention_stream.adapter_default.mona", "mona_attn")
            published = published.replace("delta.mlp_stream.adapter_default.mona", "mona_mlp")
            close(parameter.grad, tensors[f"grad_f64.{published}"], dtype)
            trained += parameter.numel()
    assert trained == int(meta["mona_params"]) + int(meta["head_params"])


def test_import_names_what_is_missing():
    model, _, adapter, _ = swin_with_mona(torch.float32)
    missing = next(iter(adapter))
    with pytest.raises(ValueError, match=r"missing: layers\.\d"):
        dl.import_official(model, {k: v for k, v in adapter.items() if k != missing}, source="mona")
    with pytest.raises(ValueError, match="unknown source"):
        dl.import_official(model, adapter, source="monna")


def test_lora_in_fused_qkv():
    """loralib's MergedLinear: rows 0:r of A feed q, rows r:2r feed v."""
    tensors, _ = reference.load("lora_qkv_d96_r64")
    model = SwinTransformer(img_size=28, patch_size=4, window_size=7, embed_dim=96, depths=(1,), num_heads=(4,))
    dl.attach(model, dl.LoRAConfig.mona_baseline())
    model.double().eval()
    qkv = model.layers[0].blocks[0].attn.qkv
    pairs: dict[str, LoRALayer] = dict(qkv.delta.of("default"))
    with torch.no_grad():
        qkv.weight.copy_(tensors["param.weight"])
        qkv.bias.copy_(tensors["param.bias"])
        for i, part in enumerate(("q.lora", "v.lora")):
            pairs[part].lora_A.weight.copy_(tensors["param.lora_A"][64 * i : 64 * (i + 1)])
            pairs[part].lora_B.weight.copy_(tensors["param.lora_B"][96 * i : 96 * (i + 1)])
    x = tensors["input"].double().requires_grad_()
    y = qkv(x)
    close(y, tensors["output_f64"], torch.float64)
    (y * tensors["cotangent"].double()).sum().backward()
    close(x.grad, tensors["grad_f64.input"], torch.float64)
    for i, part in enumerate(("q.lora", "v.lora")):
        close(pairs[part].lora_A.weight.grad, tensors["grad_f64.lora_A"][64 * i : 64 * (i + 1)], torch.float64)
        close(pairs[part].lora_B.weight.grad, tensors["grad_f64.lora_B"][96 * i : 96 * (i + 1)], torch.float64)
