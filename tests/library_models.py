"""Tiny networks of torchvision and open_clip with random weights."""

from __future__ import annotations

import open_clip.transformer
import torch
import torchvision.models as tv
from models import CLASSES, randomize
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}


class WithHead(nn.Module):
    """An image tower and a classifier layer on its features."""

    def __init__(self, visual: nn.Module, width: int = 10):
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.visual(x))


def sized(model: nn.Module, side: int) -> nn.Module:
    """Tell what size of images the model is for."""
    model.pretrained_cfg = {"input_size": (3, side, side)}
    return model


# ------------------------------------------------------------------ torchvision
def tiny_tv_vit(**kwargs) -> tv.VisionTransformer:
    """3 blocks, 24 channels, class token, 4x4 patches of 8 px; an even number of heads, as the fast path wants it."""
    settings = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 48}
    return randomize(tv.VisionTransformer(**{**settings, "num_classes": CLASSES, **kwargs})).eval()


def tiny_tv_swin(version: int = 1, **kwargs) -> tv.SwinTransformer:
    """2 stages of 2 blocks, 12 and 24 channels, windows of 4; the second block of each stage is shifted."""
    settings = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    if version == 2:
        settings |= {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    settings |= {"stochastic_depth_prob": 0.0, "num_classes": CLASSES}
    return sized(randomize(tv.SwinTransformer(**{**settings, **kwargs})).eval(), 32)


def tiny_tv_swin_v2(**kwargs) -> tv.SwinTransformer:
    return tiny_tv_swin(2, **kwargs)


def tiny_tv_convnext(**kwargs) -> tv.ConvNeXt:
    """3 stages, 4 blocks, 8 to 16 channels."""
    stages = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)]
    return sized(randomize(tv.ConvNeXt(stages, num_classes=CLASSES, **kwargs)).eval(), 32)


def tiny_tv_resnet(block=tv.resnet.Bottleneck, **kwargs) -> tv.ResNet:
    """torchvision's class with narrow layers of its own making: 4 stages, 5 blocks, a stem of 8 channels."""
    with torch.device("meta"):
        model = tv.ResNet(block, [1, 1, 1, 1], CLASSES, **kwargs)
    model.conv1, model.bn1, model.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
    for i, (planes, depth) in enumerate([(4, 1), (6, 2), (8, 1), (10, 1)]):
        setattr(model, f"layer{i + 1}", model._make_layer(block, planes, depth, stride=1 if i == 0 else 2))
    model.fc = nn.Linear(10 * block.expansion, CLASSES)
    return sized(randomize(model).eval(), 32)


# ------------------------------------------------------------------ open_clip
def tiny_oc_visual(**kwargs) -> open_clip.transformer.VisionTransformer:
    """3 blocks, 24 channels, LayerScale, 4x4 patches of 8 px, features of 10 channels."""
    settings = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "heads": 4, "mlp_ratio": 2.0}
    settings |= {"ls_init_value": 0.5, "output_dim": 10}
    return randomize(open_clip.transformer.VisionTransformer(**{**settings, **kwargs})).eval()


def tiny_oc_custom(**kwargs) -> open_clip.transformer.VisionTransformer:
    """The same of open_clip's own attention: qk-norm, head scales, all further norms."""
    options = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    return tiny_oc_visual(**dict.fromkeys(options, True), **kwargs)


def tiny_oc_resnet() -> ModifiedResNet:
    return randomize(ModifiedResNet([1, 1, 2, 1], 10, 4, image_size=32, width=8)).eval()


def tiny_timm_trunk(name: str = "test_vit", pool: str = "token") -> TimmModel:
    return randomize(TimmModel(name, 10, 160, pool=pool)).eval()


def tiny_clip(custom_text: bool = False, **vision) -> nn.Module:
    """Both towers: images of 32 px, texts of 6 of 20 tokens."""
    image = CLIPVisionCfg(**{"layers": 3, "width": 24, "head_width": 6, "patch_size": 8, "image_size": 32, **vision})
    cls = CustomTextCLIP if custom_text else CLIP
    return randomize(cls(10, image, CLIPTextCfg(**TEXT))).eval()


def texts(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(3))
