"""VPT against the published implementation: ViT, MAE, MoCo-v3, Swin."""

import pytest
import reference
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import deltalens as dl

FEATURE = {"atol": 2e-5, "rtol": 1e-4}


def gradient_close(found, expected):
    torch.testing.assert_close(found, expected.view(found.shape), atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def tiny_vit(**settings) -> VisionTransformer:
    backbone, _ = reference.load("vpt_vit_backbone")
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=4, num_classes=5, **settings
    )  # fmt: skip
    state = reference.sub(backbone, "timm.")
    if settings.get("fc_norm"):
        state["fc_norm.weight"], state["fc_norm.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    head = {f"head.{leaf}": backbone[f"repo.head.last_layer.{leaf}"] for leaf in ("weight", "bias")}
    model.load_state_dict(state | head)
    return model


def official(tensors):
    return reference.sub(tensors, "repo.")


def prompts_in_order(model):
    rows = [p for path, p in model.named_parameters() if path.endswith("vpt.embedding")]
    return torch.stack([p.grad for p in rows])


VIT = {
    "vpt_vit_shallow_p5": ({}, False),
    "vpt_vit_deep_p5": ({}, True),
    "vpt_vit_deep_p5_img_pool": ({"global_pool": "avg", "fc_norm": False}, True),
    "vpt_moco_deep_p5": ({}, True),
    "vpt_mae_deep_p5_img_pool": ({"global_pool": "avg", "fc_norm": True}, True),
}


@pytest.mark.parametrize("name", VIT)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain attention"])
def test_vit(name, fused):
    settings, deep = VIT[name]
    tensors, _ = reference.load(name)
    model = dl.attach(tiny_vit(**settings), dl.VPTConfig(num_tokens=5, deep=deep)).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    dl.import_official(model, official(tensors), source="vpt")
    x = tensors["input.image"]
    logits = model(x)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, tensors["out.feature"], **FEATURE)
    torch.testing.assert_close(logits, tensors["out.logits"], **FEATURE)
    F.cross_entropy(logits, tensors["input.target"]).backward()
    grads = reference.sub(tensors, "grad.enc.")
    expected = [g for key in sorted(grads, reverse=True) for g in grads[key] if "prompt" in key]
    gradient_close(prompts_in_order(model), torch.stack(expected))
    if "grad.head.last_layer.weight" in tensors:
        gradient_close(model.head.weight.grad, tensors["grad.head.last_layer.weight"])


@pytest.mark.parametrize("name", ["vpt_vit_deep_p5_project24", "vpt_vit_shallow_p5_project24"])
def test_projected_prompts_are_imported_projected(name):
    tensors, _ = reference.load(name)
    model = dl.attach(tiny_vit(), dl.VPTConfig(num_tokens=5, deep="deep" in name)).eval()
    dl.import_official(model, official(tensors), source="vpt")
    torch.testing.assert_close(model(tensors["input.image"]), tensors["out.logits"], **FEATURE)


def test_training_steps():
    """SGD momentum .9, weight decay .01 but on the head's bias, the published learning rates; compared until the loss
    has vanished."""
    tensors, _ = reference.load("vpt_train6_deep_p5")
    start, _ = reference.load("vpt_vit_deep_p5")
    model = dl.attach(tiny_vit(), dl.VPTConfig(num_tokens=5))
    dl.import_official(model, official(start), source="vpt")
    groups = [
        {"params": [p], "weight_decay": 0.0 if p is model.head.bias else 0.01}
        for p in model.parameters()
        if p.requires_grad
    ]
    optimiser = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    model.train()
    for step in range(4):
        for group in optimiser.param_groups:
            group["lr"] = float(tensors["lrs"][step])
        loss = F.cross_entropy(model(tensors["input.image"]), tensors["input.target"])
        torch.testing.assert_close(loss.detach().double(), tensors["losses"][step].view(()), atol=1e-4, rtol=1e-3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first = tensors[f"step{step}.enc.transformer.prompt_embeddings"][0]
        torch.testing.assert_close(
            model.blocks[0].delta.attention_prompts.adapter_default.vpt.embedding.detach(), first, atol=2e-4, rtol=1e-3
        )


def tiny_swin(name: str, meta: dict) -> SwinTransformer:
    backbone, _ = reference.load(name)
    numbers = {key: eval(meta[key], {"__builtins__": {}}) for key in ("depths", "heads", "embed", "img", "window")}
    model = SwinTransformer(
        img_size=numbers["img"],
        patch_size=4,
        window_size=numbers["window"],
        embed_dim=numbers["embed"],
        depths=numbers["depths"],
        num_heads=numbers["heads"],
        num_classes=5,
    )
    state = {key: tensor for key, tensor in reference.sub(backbone, "repo.enc.").items() if "downsample" not in key}
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    state |= {key: tensor for key, tensor in reference.sub(backbone, "timm.").items() if "downsample" in key}
    missing = model.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"head.fc.weight", "head.fc.bias"}
    assert not missing.unexpected_keys
    return model.eval()


SWIN = {
    "vpt_swin2_shallow_p5": ("vpt_swin2_backbone", 5),
    "vpt_swin4_shallow_p3": ("vpt_swin4_backbone", 3),
    "vpt_swin4_deep_p3": ("vpt_swin4_backbone", 3),
}


@pytest.mark.parametrize("name", SWIN)
def test_swin(name):
    """Each image alone is the correct reference; the published code mixes the images of a batch, ours does not."""
    backbone, tokens = SWIN[name]
    tensors, meta = reference.load(name)
    model = dl.attach(tiny_swin(backbone, meta), dl.VPTConfig(num_tokens=tokens, deep="deep" in name)).eval()
    dl.import_official(model, official(tensors), source="vpt")
    x, target = tensors["input.image"], tensors["input.target"]
    torch.testing.assert_close(model(x), tensors["out.logits_batch1"], **FEATURE)
    for sample in range(2):
        model.zero_grad()
        logits = model(x[sample : sample + 1])
        F.cross_entropy(logits, target[sample : sample + 1]).backward()
        grads = reference.sub(tensors, f"grad_sample{sample}.enc.")
        found = [p.grad for path, p in model.named_parameters() if path.endswith("vpt.embedding")]
        expected = [row for key in sorted(grads, key=lambda k: (k != "prompt_embeddings", k)) for row in grads[key]]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            gradient_close(ours, theirs)


def test_initial_bound():
    from deltalens.methods.vpt import init_bound

    assert init_bound((16, 16), 768) == 0.0625
    assert round(init_bound((4, 4), 128), 5) == 0.18464
    model = dl.attach(VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=2), dl.VPTConfig(num_tokens=400))
    prompts = model.blocks[1].delta.attention_prompts.adapter_default.vpt.embedding
    bound = init_bound((16, 16), 48)
    assert 0.98 * bound < float(prompts.detach().abs().max()) <= bound


def test_wrong_depth_is_named():
    tensors, _ = reference.load("vpt_vit_deep_p5")
    model = dl.attach(tiny_vit(), dl.VPTConfig(num_tokens=5, deep=False))
    with pytest.raises(ValueError, match="deep=True"):
        dl.import_official(model, official(tensors), source="vpt")
