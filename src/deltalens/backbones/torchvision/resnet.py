"""torchvision's ResNet, ResNeXt and Wide ResNet: basic blocks and bottlenecks, also inside detectors and segmenters.

    y = block.stream( relu( shortcut(x) + inner(branch(x)) ) )

The convolutions up to the last norm are the branch; like ConvNeXt's it is called `mlp`. There is no norm of the stream
to read, and input and output may differ in shape, so that there are no `pre` and no parallel slots. Convolutions are no
parts for LoRA; SSF scales them, as it does the norms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.unknown import input_size
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.layout import ChannelsFirst
from deltalens.sites.output import changed_features, live
from deltalens.sites.swap import original_class, original_method

_SLOTS = frozenset({"mlp.inner", "block.stream"})


def _joined(block: BasicBlock | Bottleneck, x: Tensor, u: Tensor) -> Tensor:
    slots = block.delta
    u = slots.chain("mlp.inner", u, slots.layout)
    shortcut = x if block.downsample is None else block.downsample(x)
    return slots.chain("block.stream", block.relu(u + shortcut), slots.layout)


def _basic_forward(self: BasicBlock, x: Tensor) -> Tensor:
    u = self.relu(self.bn1(self.conv1(x)))
    return _joined(self, x, self.bn2(self.conv2(u)))


def _bottleneck_forward(self: Bottleneck, x: Tensor) -> Tensor:
    u = self.relu(self.bn1(self.conv1(x)))
    u = self.relu(self.bn2(self.conv2(u)))
    return _joined(self, x, self.bn3(self.conv3(u)))


BASIC_BLOCK = Family(
    name="deltalens.backbones.torchvision.resnet:BASIC_BLOCK",
    methods={"forward": _basic_forward},
    slots=_SLOTS,
    width=lambda block: block.conv2.out_channels,
)
BOTTLENECK = Family(
    name="deltalens.backbones.torchvision.resnet:BOTTLENECK",
    methods={"forward": _bottleneck_forward},
    slots=_SLOTS,
    width=lambda block: block.conv3.out_channels,
)
_FAMILY = {BasicBlock.forward: BASIC_BLOCK, Bottleneck.forward: BOTTLENECK}


def _forward(self: ResNet, x: Tensor) -> Tensor:
    if not live(self, "output"):
        return original_method(self, "forward")(x)
    y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
    features = torch.flatten(self.avgpool(y), 1)
    return self.fc(changed_features(self, features, x))


OWNER = Family(
    name="deltalens.backbones.torchvision.resnet:OWNER", methods={"forward": _forward}, slots=frozenset({"output"})
)


def _add_classifier(tower: Tower, path: str, model: ResNet) -> None:
    cls = original_class(model)
    untouched = cls.forward is ResNet.forward and cls._forward_impl is ResNet._forward_impl
    if untouched and hasattr(model.fc, "in_features"):
        tower.classifier = Site(path, model, OWNER, model.fc.in_features, tower=tower)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all ResNet blocks in the tree. The stem is the first convolution of the model."""
    tower, stem = Tower("vision", ChannelsFirst()), None
    for path, module in model.named_modules():
        if "delta" in path.split("."):
            continue
        if isinstance(module, (BasicBlock, Bottleneck)) and original_class(module).forward in _FAMILY:
            family = _FAMILY[original_class(module).forward]
            tower.add(path, module, family, family.width(module))
        elif isinstance(module, ResNet):
            _add_classifier(tower, path, module)
        elif isinstance(module, nn.Conv2d) and stem is None:
            stem = path, module
    if not tower.blocks:
        return
    if stem is not None:
        tower.image = Site(*stem, IMAGE, stem[1].out_channels, tower=tower)
        tower.stem = Site(*stem, STEM, stem[1].out_channels, tower=tower)
        tower.image_size = input_size(model)[1:]
    yield "", tower
