"""Sidetune (Zhang et al., ECCV 2020, arXiv 1912.13503): a small network beside the frozen one, as in VPT's code."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.base import Method, may_fetch, register, setting
from deltalens.sites.anatomy import Anatomy
from deltalens.sites.layout import Patches
from deltalens.sites.output import features_site

ALEXNET_SMALLEST = 63  # pixels; below, its poolings run out of rows
ALEXNET_FEATURES = 256 * 6 * 6


class SideNetwork(nn.Module):
    """f' = s(alpha) f + (1 - s(alpha)) projection( AlexNet's convolutions(images) ),  s the sigmoid, alpha from 0.

    f (B, d) are the backbone's pooled features. The five convolutions give a map of 256 channels, pooled to 6 x 6;
    projection 9216 -> d has no bias. Images whose shorter side is under min_size are enlarged to it, bilinearly.
    """

    def __init__(self, dim: int, min_size: int = ALEXNET_SMALLEST, pretrained: bool = False):
        super().__init__()
        alexnet = _alexnet(pretrained)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.features, self.pool = alexnet.features, alexnet.avgpool
        self.projection = nn.Linear(ALEXNET_FEATURES, dim, bias=False)
        self.min_size = min_size

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        shorter = min(images.shape[-2:])
        if shorter < self.min_size:
            size = [-(-side * self.min_size // shorter) for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        side = self.projection(self.pool(self.features(images)).flatten(1))
        share = self.alpha.sigmoid()
        return share * features + (1 - share) * side


@register("sidetune")
class SidetuneConfig(Method):
    """A trained AlexNet beside the frozen backbone; their features are mixed before the head, which is trained.

        f' = s(alpha) f + (1 - s(alpha)) projection( AlexNet(images) )

    alpha starts at 0, so that both have half a share: the start is not the backbone. The whole side network is trained,
    ImageNet weights are its start as in VPT's code (pretrained=True, from torchvision). It sees the images as the
    backbone does, with the backbone's normalisation. AlexNet takes images from 63 px; smaller ones are enlarged to
    min_size. Adapter files hold the side network, and loading one fetches nothing.

    Works on every classifier with timm's interface. Parameters: 2,469,697 + 9,216 d; ViT-B/16 9,547,585.
    """

    learning_rate: ClassVar = 3e-4

    pretrained: bool = setting(default=True, help="start the side network from torchvision's ImageNet weights")
    min_size: int = setting(
        default=ALEXNET_SMALLEST, help="images with a shorter side under this are enlarged to it; 224 is AlexNet's own"
    )

    def __post_init__(self):
        if self.min_size < ALEXNET_SMALLEST:
            raise ValueError(f"min_size must be at least {ALEXNET_SMALLEST}, AlexNet's smallest, got {self.min_size}")

    def place(self, anatomy: Anatomy):
        site = features_site(anatomy, "Sidetune")
        if site.tower is not None and isinstance(site.tower.layout, Patches):
            raise TypeError(
                f"Sidetune has an AlexNet for images beside the backbone, and {type(anatomy.model).__name__} reads "
                "point clouds; use Adapter, AdaptFormer, LoRA or VPT here"
            )
        yield site, "output", SideNetwork(site.width_of("output"), self.min_size, self.pretrained and may_fetch())


def _alexnet(pretrained: bool) -> nn.Module:
    from torchvision.models import AlexNet_Weights, alexnet

    try:
        return alexnet(weights=AlexNet_Weights.IMAGENET1K_V1 if pretrained else None)
    except OSError as error:  # urllib's errors are OSErrors
        raise ConnectionError(
            f"AlexNet's ImageNet weights could not be fetched: {error}. Go online, or set pretrained=False, which "
            "starts the side network from random weights"
        ) from error
