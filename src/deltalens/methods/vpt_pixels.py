"""VPT's prompts in pixel space: patches, further image channels, a frame around the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.vpt_prompts import hold
from deltalens.sites.layout import Layout, Tokens

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _initial(shape: tuple[int, ...], init: str, bound: float) -> Tensor:
    """gaussian: N(0, 1). imagenet: U(0, 1), pixels as a picture file has them. uniform: U(-bound, bound)."""
    if init == "gaussian":
        return torch.randn(shape)
    return torch.rand(shape) if init == "imagenet" else torch.empty(shape).uniform_(-bound, bound)


class _Pixels(nn.Module):
    """Prompts that may be pixels in (0, 1): those are normalised as images are, each time they are used."""

    def __init__(self, channels: int, init: str):
        super().__init__()
        self.normalised = init == "imagenet"
        if self.normalised:
            fits = channels == len(IMAGENET_MEAN)
            mean = IMAGENET_MEAN if fits else (sum(IMAGENET_MEAN) / 3,) * channels
            std = IMAGENET_STD if fits else (sum(IMAGENET_STD) / 3,) * channels
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def as_image(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std if self.normalised else pixels


def is_patch_embedding(embed: nn.Module | None, layout: Layout) -> bool:
    """Whether a module makes tokens of patches: a convolution `proj` and a `norm`, or, before tokens, one bare
    convolution whose patches do not overlap."""
    if isinstance(embed, nn.Conv2d):
        return embed.stride == embed.kernel_size and isinstance(layout, Tokens)
    return hasattr(embed, "proj") and hasattr(embed, "norm")


class PatchPrompts(_Pixels):
    """p patch-sized pictures that go through the frozen patch embedding and join the stream after its prefix tokens.

    pixels: (1, channels, patch height, p * patch width). No position embedding is added.

    The patch embedding's weights are copied into buffers that files do not hold. The patch embedding itself cannot be a
    child here: its tensors would be in the model under two names, adapters would save and count them as their own,
    and every `.to` of the adapter would act on the backbone. The copy is made when the adapter is attached, so a
    patch embedding that is trained in the same adapter (BitFit) acts on the image's patches only.
    """

    pointwise = True

    def __init__(self, embed: nn.Module, num_tokens: int, init: str, bound: float, trained: bool = True):
        conv, norm = (embed, None) if isinstance(embed, nn.Conv2d) else (embed.proj, embed.norm)
        super().__init__(conv.in_channels, init)
        height, width = conv.kernel_size
        shape = (1, conv.in_channels, height, width * num_tokens)
        hold(self, "pixels", _initial(shape, init, bound), trained)
        if norm is not None and not isinstance(norm, (nn.LayerNorm, nn.Identity)):
            raise TypeError(f"location='prepend-pixel' does not know the patch embedding's {type(norm).__name__}")
        norm = norm if isinstance(norm, nn.LayerNorm) else None
        self.eps = norm.eps if norm else None
        for name, tensor in (
            ("weight", conv.weight),
            ("bias", conv.bias),
            ("norm_weight", norm.weight if norm else None),
            ("norm_bias", norm.bias if norm else None),
        ):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone(), persistent=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        patches = F.conv2d(self.as_image(self.pixels), self.weight, self.bias, stride=self.weight.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2)
        if self.eps is not None:
            tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
        return layout.insert(x, tokens)


class ImageChannels(nn.Module):
    """p further channels of the image, and the weights with which the first convolution reads them.

    image: (1, p, H, W), resized bilinearly for images of another size. weight: (C, p, kernel height, kernel width). The
    convolution's own weight and bias are trained beside it. A convolution is linear in its input channels, so what
    the new ones add to its output is computed alone, once for all images of a batch.
    """

    def __init__(self, conv: nn.Conv2d, num_channels: int, size: tuple[int, int], bound: float):
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise TypeError(f"location='concat-channel' needs an ungrouped, zero-padded first convolution, not {conv}")
        self.image = nn.Parameter(_initial((1, num_channels, *size), "uniform", bound))
        shape = (conv.out_channels, num_channels, *conv.kernel_size)
        self.weight = nn.Parameter(_initial(shape, "uniform", bound))
        self.geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    def forward(self, image: Tensor) -> Tensor:
        """image (B, channels, H, W): its size is read. Returns (1, C, h, w), for the convolution's output."""
        channels, size = self.image, image.shape[-2:]
        if channels.shape[-2:] != size:
            channels = F.interpolate(channels, size, mode="bilinear")
        return F.conv2d(channels, self.weight, **self.geometry)


class Frame(_Pixels):
    """A learned frame of p pixels around the image: (B, channels, H, W) -> (B, channels, H + 2p, W + 2p).

    tb: (1, channels, 2p, W + 2p), the rows above, then those below. lr: (1, channels, H, 2p), the columns to the left,
    then those to the right. Around images of another size they are resized bilinearly along the image's sides.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int, init: str, trained: bool = True):
        init = "imagenet" if init == "uniform" else init
        super().__init__(channels, init)
        self.width = width
        hold(self, "tb", _initial((1, channels, 2 * width, size[1] + 2 * width), init, 1.0), trained)
        hold(self, "lr", _initial((1, channels, size[0], 2 * width), init, 1.0), trained)

    def forward(self, image: Tensor) -> Tensor:
        p, (height, width) = self.width, image.shape[-2:]
        above, below = _fitted(self.as_image(self.tb), (2 * p, width + 2 * p)).split(p, -2)
        left, right = _fitted(self.as_image(self.lr), (height, 2 * p)).split(p, -1)
        rows = [part.to(image.dtype).expand(len(image), -1, -1, -1) for part in (above, below)]
        columns = [part.to(image.dtype).expand(len(image), -1, -1, -1) for part in (left, right)]
        return torch.cat([rows[0], torch.cat([columns[0], image, columns[1]], -1), rows[1]], -2)


def _fitted(part: Tensor, size: tuple[int, int]) -> Tensor:
    return part if part.shape[-2:] == size else F.interpolate(part, size, mode="bilinear")
