"""torchvision's Swin with prompts, merging, published networks, detectors and segmenters."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from library_models import (
    tiny_tv_resnet,
    tiny_tv_swin,
    tiny_tv_swin_v2,
    tiny_tv_vit,
)
from models import assert_same, backward, images, randomize_adapter
from test_family_torchvision import MODELS, double_images, prompts_of
from torch import nn

import deltalens as dl
from deltalens.sites.swap import Swapped


# ------------------------------------------------------------------ prompts in Swin
def window_attention(attn, x, prompts):
    """Window by window, with loops: x (B, H, W, C), prompts (B, p, C), both as the attention reads them."""
    (_, height, width, channels), (rows, columns), heads = x.shape, attn.window_size, attn.num_heads
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    size, p = x.shape[1:3], prompts.shape[1]
    shift = [s if w < side else 0 for s, w, side in zip(attn.shift_size, attn.window_size, size, strict=True)]
    bias, cosine = attn.get_relative_position_bias()[0], hasattr(attn, "logit_scale")
    in_bias = attn.qkv.bias.clone()
    if cosine:
        in_bias[channels : 2 * channels] = 0
    out, from_prompts = torch.zeros_like(x), []
    for top in range(0, size[0], rows):
        for left in range(0, size[1], columns):
            ys = [(top + i + shift[0]) for i in range(rows) for _ in range(columns)]
            xs = [(left + j + shift[1]) for _ in range(rows) for j in range(columns)]
            wrapped = torch.tensor([(y >= size[0]) * 2 + (z >= size[1]) for y, z in zip(ys, xs, strict=True)])
            ys, xs = [y % size[0] for y in ys], [z % size[1] for z in xs]
            tokens = torch.cat([prompts, x[:, ys, xs]], 1)
            q, k, v = F.linear(tokens, attn.qkv.weight, in_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            if cosine:
                scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
                scores = scores * attn.logit_scale.clamp(max=torch.log(torch.tensor(100.0)).item()).exp()
            else:
                scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            far = (wrapped[:, None] != wrapped).double() * -100
            scores[:, :, p:, p:] += bias + far
            y = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            out[:, ys, xs] = y[:, p:]
            from_prompts.append(y[:, :p])
    return out[:, :height, :width], torch.stack(from_prompts).mean(0)


def swin_with_tokens(block, feature_map, prompts):
    """A block on map and prompts."""
    second = isinstance(block, tv.swin_transformer.SwinTransformerBlockV2)
    before = nn.Identity() if second else block.norm1
    update, from_prompts = window_attention(block.attn, before(feature_map), before(prompts))
    tokens = torch.cat([prompts, feature_map.flatten(1, 2)], 1)
    updates = torch.cat([from_prompts, update.flatten(1, 2)], 1)
    tokens = tokens + (block.norm1(updates) if second else updates)
    tokens = tokens + (block.norm2(block.mlp(tokens)) if second else block.mlp(block.norm2(tokens)))
    return tokens[:, prompts.shape[1] :].unflatten(1, feature_map.shape[1:3]), tokens[:, : prompts.shape[1]]


def swin_beside_prompts(model, prompts, x, deep):
    feature_map, carried, left = model.features[0](x), None, list(prompts)
    for stage in model.features[1:]:
        if isinstance(stage, nn.Sequential):
            for block in stage:
                carried = left.pop(0).expand(len(x), -1, -1) if deep or carried is None else carried
                feature_map, carried = swin_with_tokens(block, feature_map, carried)
        else:
            first = isinstance(stage, tv.swin_transformer.PatchMerging)
            tiled = carried.repeat(1, 1, 4)
            carried = stage.reduction(stage.norm(tiled)) if first else stage.norm(stage.reduction(tiled))
            feature_map = stage(feature_map)
    return model.head(model.norm(torch.cat([carried, feature_map.flatten(1, 2)], 1)).mean(1))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("make", [tiny_tv_swin, tiny_tv_swin_v2])
def test_swin_prompts_are_the_published_tokens(make, deep):
    """On a map that windows do not divide, shifted and not."""
    model, plain, x = make().double(), make().double(), double_images(28, 20)
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=2, deep=deep)))
    plain.head.load_state_dict(model.head.state_dict())
    found, grads = backward(model, x)
    names = prompts_of(model)
    assert len(names) == (4 if deep else 1)
    prompts = [model.get_parameter(name)[None].detach().requires_grad_() for name in names]
    expected = swin_beside_prompts(plain, prompts, x, deep)
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=1e-10)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).double()
    (expected * weights).sum().backward()
    assert_same(
        {name: grads[name] for name in names},
        {name: prompt.grad[0] for name, prompt in zip(names, prompts, strict=True)},
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (12, 48)])
@pytest.mark.parametrize("make", [tiny_tv_swin, tiny_tv_swin_v2])
def test_swin_attention_as_read_is_the_library_s(make, size):
    """LoRA of zero on qkv sends the forward through our reading of the window attention."""
    model, x = make().double(), double_images(*size)
    expected = model(x)
    dl.attach(model, dl.LoRAConfig(r=2, parts=("q", "v")))
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)


def test_swin_without_its_head_takes_no_tokens_into_the_stream():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = tiny_tv_swin().features, nn.Linear(24, 5)

        def forward(self, x):
            return self.head(self.body(x).mean((1, 2)))

    with pytest.raises(TypeError, match=r"VPT-shallow needs the slot 'tokens\.in'"):
        dl.attach(Detector(), dl.VPTConfig(num_tokens=2, deep=False))
    model = dl.attach(Detector(), dl.VPTConfig(num_tokens=2), backbone="body")
    assert model(images("vit")).shape == (2, 5)


# ------------------------------------------------------------------ merging
MERGED = {
    "LoRA": dl.LoRAConfig(r=2, parts=("q", "k", "v", "proj", "fc1", "fc2")),
    "LoRA by name": dl.LoRAConfig(r=2, target_modules=("out_proj", "proj", "qkv", "fc")),
    "SSF": dl.SSFConfig(),
    "FacT": dl.FacTConfig(r=2, dropout=0.0),
    "RepAdapter": dl.RepAdapterConfig(bottleneck=4, dropout=0.0),
}
MERGES = [(family, method) for family in ("vit", "swin", "swin_v2") for method in MERGED if method != "LoRA by name"]
MERGES += [("convnext", "SSF"), ("convnext", "RepAdapter"), ("resnet", "SSF"), ("vit", "LoRA by name")]
MERGES += [("swin", "LoRA by name"), ("swin_v2", "LoRA by name")]


@pytest.mark.parametrize(("family", "method"), MERGES)
def test_merging(family, method):
    model, x = MODELS[family]().double(), double_images()
    plain = model(x)
    randomize_adapter(dl.attach(model, MERGED[method])).eval()
    expected = model(x)
    assert (expected - plain).abs().max() > 1e-3
    merged = dl.merge_and_unload(model)
    torch.testing.assert_close(merged(x), expected, atol=1e-9, rtol=1e-9)
    stays = method == "RepAdapter" and family.startswith("swin")  # windows are padded behind `attention.pre`
    assert stays or not any(isinstance(module, Swapped) for module in merged.modules())


# ------------------------------------------------------------------ published networks and what is built of them
@pytest.mark.parametrize(
    ("name", "blocks", "widths", "offered"),
    [
        ("vit_b_16", 12, {768}, {"weights:q", "weights:proj", "attention.prompts", "attention.mask"}),
        ("swin_t", 12, {96, 192, 384, 768}, {"weights:q", "weights:proj", "attention.prompts"}),
        ("swin_v2_t", 12, {96, 192, 384, 768}, {"weights:q", "weights:proj", "attention.prompts"}),
        ("convnext_tiny", 18, {96, 192, 384, 768}, {"weights:fc1", "mlp.pre"}),
        ("resnext50_32x4d", 16, {256, 512, 1024, 2048}, {"mlp.inner"}),
        ("resnet18", 8, {64, 128, 256, 512}, {"mlp.inner"}),
    ],
)
def test_published_networks(name, blocks, widths, offered):
    with torch.device("meta"):
        model = getattr(tv, name)()
    anatomy = dl.describe(model)
    (tower,) = anatomy.towers
    assert len(tower.blocks) == blocks
    assert {block.width for block in tower.blocks} == widths
    assert all(offered <= block.slots for block in tower.blocks)
    assert tower.classifier.width == model.get_submodule(anatomy.head).in_features
    assert tower.image_size == (224, 224)
    if name.startswith("swin"):
        assert [tower.blocks[i].grid for i in (0, 2, 4, 11)] == [(56, 56), (28, 28), (14, 14), (7, 7)]


def test_subclasses_with_a_forward_of_their_own_are_unknown():
    class MyBlock(tv.vision_transformer.EncoderBlock):
        def forward(self, input):
            return super().forward(input) * 2

    model = tiny_tv_vit()
    model.encoder.layers[1].__class__ = MyBlock
    slots = [block.slots for block in dl.describe(model).blocks()]
    assert slots[1] == {"block.stream"}
    assert slots[0] == slots[2] != slots[1]
    message = "self_attention.out_proj is never called: its parent MultiheadAttention"
    with pytest.raises(ValueError, match=message):
        dl.attach(model, dl.LoRAConfig(r=2, target_modules=(r"encoder_layer_1.self_attention.out_proj",)))


def test_a_detector_s_backbone():
    """backbone="backbone.body": pyramid and detection heads are trained; the adapter sits in the ResNet."""
    with torch.device("meta"):
        model = tv.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    anatomy = dl.describe(model, backbone="backbone")
    assert len(anatomy.blocks()) == 16
    assert anatomy.blocks()[0].path == "backbone.body.layer1.0"
    assert anatomy.towers[0].stem.path == "backbone.body.conv1"
    assert {"backbone.fpn", "rpn", "roi_heads"} <= set(dl.describe(model, backbone="backbone.body").outside)


def test_a_segmenter_s_backbone():
    body = tv._utils.IntermediateLayerGetter(tiny_tv_resnet(), {"layer4": "out"})
    model = tv.segmentation.FCN(body, tv.segmentation.fcn.FCNHead(40, 3)).train()
    dl.attach(model, dl.MonaConfig(bottleneck=3), backbone="backbone")
    output = model(images("vit"))["out"]
    output.sum().backward()
    assert output.shape == (2, 3, 32, 32)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(".mona." in name for name in trained)
    assert all(".mona." in name or name.startswith("classifier.") for name in trained)
