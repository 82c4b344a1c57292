"""timm's ResNet v2 (BiT and others): pre-activation blocks, and the v1.5 bottleneck of ResNet-ViT hybrids.

Pre-activation blocks are the equation with one branch: n = act(norm1 x), x <- x + drop_path(inner(u)). Where such a
block changes the shape, its shortcut reads n. `Bottleneck` has no norm in front, n is x, and an activation behind the
sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.resnetv2 import Bottleneck, PreActBasic, PreActBottleneck
from torch import Tensor, nn

from deltalens.backbones.timm.maps import OUTPUT_ONLY, find_tower, identity, one_branch
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import Branch, residual_block


def _pre_activation_forward(self: PreActBasic | PreActBottleneck, x: Tensor) -> Tensor:
    slots = self.delta

    def body(n: Tensor) -> Tensor:
        u = self.conv2(self.norm2(self.conv1(n)))
        return self.conv3(self.norm3(u)) if hasattr(self, "conv3") else u

    if self.downsample is None:
        branch = Branch("mlp", self.norm1, body, self.drop_path)
        return residual_block(slots, slots.layout, x, (branch,))
    branch = Branch("mlp", identity, body, self.drop_path, self.downsample)
    return residual_block(slots, slots.layout, self.norm1(x), (branch,))


def _bottleneck_forward(self: Bottleneck, x: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        u = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(u))

    branch = Branch("mlp", identity, body, self.drop_path, self.downsample, self.act3)
    return residual_block(self.delta, self.delta.layout, x, (branch,))


def _width(block: nn.Module) -> int:
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels


PRE_ACTIVATION = Family(
    name="deltalens.backbones.timm.resnetv2:PRE_ACTIVATION",
    methods={"forward": _pre_activation_forward},
    slots=one_branch("mlp"),
    width=_width,
)
PRE_ACTIVATION_DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.resnetv2:PRE_ACTIVATION_DOWNSAMPLING",
    methods={"forward": _pre_activation_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)
BOTTLENECK = Family(
    name="deltalens.backbones.timm.resnetv2:BOTTLENECK",
    methods={"forward": _bottleneck_forward},
    slots=one_branch("mlp"),
    width=_width,
)
BOTTLENECK_DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.resnetv2:BOTTLENECK_DOWNSAMPLING",
    methods={"forward": _bottleneck_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)


def _pre_activation(block: nn.Module) -> Family:
    return PRE_ACTIVATION if block.downsample is None else PRE_ACTIVATION_DOWNSAMPLING


def _bottleneck(block: nn.Module) -> Family:
    return BOTTLENECK if block.downsample is None else BOTTLENECK_DOWNSAMPLING


_KINDS = {PreActBasic: _pre_activation, PreActBottleneck: _pre_activation, Bottleneck: _bottleneck}


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all ResNet v2 blocks in the tree."""
    for tower in find_tower(model, _KINDS, _width):
        yield "", tower
