"""timm's ResNet: basic and bottleneck blocks of ResNet, ResNeXt, Wide ResNet, SE, ECA, -D, -RS and others.

One branch of convolutions, an activation behind the sum:  y = stream( act( skip(x) + drop_path(inner(u)) ) ).
The branch has no norm in front, so n is x. Blocks that change the shape add a shortcut of x: `DOWNSAMPLING`.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from deltalens.backbones.timm.maps import OUTPUT_ONLY, find_tower, identity, one_branch
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.swap import original_class


def _basic(block: BasicBlock, x: Tensor) -> Tensor:
    x = block.act1(block.drop_block(block.bn1(block.conv1(x))))
    return block.bn2(block.conv2(block.aa(x)))


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.act2(block.drop_block(block.bn2(block.conv2(x))))
    return block.bn3(block.conv3(block.aa(x)))


def _block_forward(self: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    basic = original_class(self).forward is BasicBlock.forward

    def body(x: Tensor) -> Tensor:
        u = _basic(self, x) if basic else _bottleneck(self, x)
        return u if self.se is None else self.se(u)

    drop_path = identity if self.drop_path is None else self.drop_path
    branch = Branch("mlp", identity, body, drop_path, self.downsample, self.act2 if basic else self.act3)
    return residual_block(self.delta, self.delta.layout, x, (branch,))


def _width(block: BasicBlock | Bottleneck) -> int:
    return (block.conv2 if isinstance(block, BasicBlock) else block.conv3).out_channels


BLOCK = Family(
    name="deltalens.backbones.timm.resnet:BLOCK",
    methods={"forward": _block_forward},
    slots=one_branch("mlp"),
    width=_width,
)
DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.resnet:DOWNSAMPLING",
    methods={"forward": _block_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)


def _family(block: BasicBlock | Bottleneck) -> Family:
    return BLOCK if block.downsample is None else DOWNSAMPLING


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all basic and bottleneck blocks in the tree."""
    for tower in find_tower(model, {BasicBlock: _family, Bottleneck: _family}, _width):
        yield "", tower
