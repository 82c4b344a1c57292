"""Tiny networks with random weights, one factory per family, and the methods that fit them."""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deltalens.methods import (
    AdapterXConfig,
    BitFitConfig,
    ConvpassConfig,
    FacTConfig,
    LoRAConfig,
    MonaConfig,
    RepAdapterConfig,
    SSFConfig,
    VPTConfig,
)

CLASSES = 5


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a random value of a sensible size, none of them zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            noise = torch.randn(parameter.shape, generator=generator) * max(fan_in, 4) ** -0.5
        else:
            noise = (parameter == 1).float() + 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def tiny_vit(**kwargs) -> VisionTransformer:
    """3 blocks, 24 channels, class token, 4x4 patches of 8 px."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
    return randomize(VisionTransformer(**{**settings, **kwargs})).eval()


def tiny_swin(**kwargs) -> SwinTransformer:
    """2 stages of 2 blocks, 12 and 24 channels, windows of 4 (shifted in the first stage's second block)."""
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "num_classes": CLASSES,
    }
    return randomize(SwinTransformer(**{**settings, **kwargs})).eval()


def tiny_swin_v2(**kwargs) -> SwinTransformerV2:
    """The post-norm Swin, same sizes as `tiny_swin`."""
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "num_classes": CLASSES,
    }
    return randomize(SwinTransformerV2(**{**settings, **kwargs})).eval()


class UnreadBlock(SwinTransformerV2Block):
    """A block with a forward of its own, which therefore no family reads. Its attention goes around `qkv`."""

    def forward(self, x):
        return super().forward(x)


def tiny_unread(**kwargs) -> SwinTransformerV2:
    """A network of no known family whose blocks are post-norm and multiply with a layer's weight themselves."""
    model = tiny_swin_v2(**kwargs)
    for stage in model.layers:
        for block in stage.blocks:
            block.__class__ = UnreadBlock
    return model


def tiny_convnext(**kwargs) -> ConvNeXt:
    """4 stages, 5 blocks, 8 to 20 channels, strides 4 to 32."""
    settings = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": CLASSES}
    return randomize(ConvNeXt(**{**settings, **kwargs})).eval()


class UnknownBlock(BasicBlock):
    """A block with a forward of its own, so that no family knows what it does."""

    def forward(self, x):
        return super().forward(x)


def tiny_resnet(**kwargs) -> ResNet:
    """The network of no known family: 4 stages of basic blocks with BatchNorm, 8 to 20 channels."""
    settings = {
        "block": UnknownBlock,
        "layers": (2, 1, 2, 1),
        "channels": (8, 12, 16, 20),
        "num_classes": CLASSES,
        "zero_init_last": False,
    }
    model = ResNet(**{**settings, **kwargs})
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return randomize(model).eval()


MODELS = {"vit": tiny_vit, "swin": tiny_swin, "convnext": tiny_convnext, "resnet": tiny_resnet}
IMAGE_SIZE = {"vit": 32, "swin": 32, "convnext": 64, "resnet": 64}

METHODS = {
    "mona": MonaConfig(bottleneck=6, dropout=0.0),
    "vpt-deep": VPTConfig(num_tokens=3),
    "vpt-shallow": VPTConfig(num_tokens=3, deep=False),
    "lora": LoRAConfig(r=2, parts=("q", "v")),
    "lora-mlp": LoRAConfig(r=2, parts=("fc1", "fc2")),
    "bitfit": BitFitConfig(),
    "ssf": SSFConfig(),
    "fact": FacTConfig(r=3, scale=0.5, dropout=0.0),
    "fact-tk": FacTConfig(r=3, form="tk", scale=0.5, dropout=0.0),
    "fact-mlp": FacTConfig(r=3, parts=("fc1", "fc2"), dropout=0.0),
    "repadapter": RepAdapterConfig(bottleneck=4, scale=0.5, dropout=0.0),
    "convpass": ConvpassConfig(bottleneck=3, scale=0.5, dropout=0.0),
    "adapter-x": AdapterXConfig(experts=3, bottleneck=4, router_width=5, dropout=0.0, last_prompt=True),
    "adapter-x-serial": AdapterXConfig(
        experts=3, bottleneck=4, router_width=5, dropout=0.0, placement="serial", dense=True
    ),
}
# what each family can be adapted with
PAIRS = [
    *[("vit", method) for method in ("mona", "vpt-deep", "vpt-shallow", "lora", "bitfit")],
    *[("swin", method) for method in ("mona", "vpt-deep", "vpt-shallow", "lora", "bitfit")],
    *[("convnext", method) for method in ("mona", "lora-mlp", "bitfit")],
    *[("resnet", method) for method in ("mona", "bitfit")],
    *[(family, "ssf") for family in ("vit", "swin", "convnext", "resnet")],
    *[(family, "fact") for family in ("vit", "swin")],
    ("vit", "fact-tk"),
    ("convnext", "fact-mlp"),
    *[(family, "repadapter") for family in ("vit", "swin", "convnext")],
    *[(family, "convpass") for family in ("vit", "swin")],
    *[(family, "adapter-x") for family in ("vit", "swin")],
    *[(family, "adapter-x-serial") for family in ("vit", "convnext")],
]


def images(family: str, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> torch.Tensor:
    """Random images of the family's native size, or of another (height, width)."""
    height, width = size or (IMAGE_SIZE[family],) * 2
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def randomize_adapter(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every trainable tensor off its initial value, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.2 * noise.to(parameter.dtype))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of all trainable tensors; one that got none is an error."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return {name: gradient.clone() for name, gradient in found.items()}


def backward(model: nn.Module, x: torch.Tensor, seed: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients of sum(output * fixed random weights)."""
    model.zero_grad()
    output = model(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    (output * weights.to(output)).sum().backward()
    return output.detach(), gradients(model)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    """Dictionaries of tensors agree, key by key."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
