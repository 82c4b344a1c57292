"""timm's RegNet (X, Y, Z, V): bottleneck blocks with grouped convolutions.

`Bottleneck` is ResNet's:  y = stream( act( skip(x) + drop_path(inner(u)) ) ), n is x. `PreBottleneck` normalises x
first, for branch and skip alike; its n, and the x that parallel modules read, is that normalised stream.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.regnet import Bottleneck, PreBottleneck
from torch import Tensor, nn

from deltalens.backbones.timm.maps import OUTPUT_ONLY, find_tower, identity, one_branch
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.swap import original_class


def _body(block: Bottleneck, x: Tensor) -> Tensor:
    return block.conv3(block.se(block.conv2(block.conv1(x))))


def _pre_body(block: PreBottleneck, x: Tensor) -> Tensor:
    x = block.conv2(block.norm2(block.conv1(x)))
    return block.conv3(block.norm3(block.se(x)))


def _block_forward(self: Bottleneck | PreBottleneck, x: Tensor) -> Tensor:
    slots, first = self.delta, original_class(self).forward is PreBottleneck.forward
    body, act = (_pre_body, identity) if first else (_body, self.act3)
    x = self.norm1(x) if first else x
    if self.downsample is None:
        u = slots.chain("mlp.inner", body(self, x), slots.layout)
        return slots.chain("block.stream", act(u), slots.layout)
    branch = Branch("mlp", identity, lambda n: body(self, n), self.drop_path, self.downsample, act)
    return residual_block(slots, slots.layout, x, (branch,))


def _width(block: Bottleneck | PreBottleneck) -> int:
    return block.conv3.out_channels if isinstance(block, PreBottleneck) else block.conv3.conv.out_channels


BLOCK = Family(
    name="deltalens.backbones.timm.regnet:BLOCK",
    methods={"forward": _block_forward},
    slots=one_branch("mlp"),
    width=_width,
)
DOWNSAMPLING = Family(
    name="deltalens.backbones.timm.regnet:DOWNSAMPLING",
    methods={"forward": _block_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)


def _family(block: Bottleneck | PreBottleneck) -> Family:
    return BLOCK if isinstance(block.downsample, nn.Identity) else DOWNSAMPLING


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all RegNet blocks in the tree."""
    for tower in find_tower(model, {Bottleneck: _family, PreBottleneck: _family}, _width):
        yield "", tower
