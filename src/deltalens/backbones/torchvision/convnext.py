"""torchvision's ConvNeXt: one residual branch, convolution first, so there is no norm(x) for parallel modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, ConvNeXt

from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.backbones.unknown import input_size
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.layout import ChannelsFirst, ChannelsLast
from deltalens.sites.output import changed_features, live
from deltalens.sites.swap import original_class, original_method

_CHANNELS_LAST = ChannelsLast()
_STEPS = ("Conv2d", "Permute", "LayerNorm", "Linear", "GELU", "Linear", "Permute")


def _block_forward(self: CNBlock, input: Tensor) -> Tensor:
    """x + drop(inner(gamma * mlp(pre(norm(dwconv(x)))))), then stream. `pre` sees channels last."""
    slots = self.delta
    convolve, to_last, norm, *mlp = self.block
    u = slots.chain("mlp.pre", norm(to_last(convolve(input))), _CHANNELS_LAST)
    for step in mlp:
        u = step(u)
    u = slots.chain("mlp.inner", self.layer_scale * u, slots.layout)
    return slots.chain("block.stream", self.stochastic_depth(u) + input, slots.layout)


def _width(block: CNBlock) -> int:
    return block.block[0].out_channels


BLOCK = Family(
    name="deltalens.backbones.torchvision.convnext:BLOCK",
    methods={"forward": _block_forward},
    slots=frozenset({"mlp.pre", "mlp.inner", "block.stream"}),
    parts=lambda block: {"fc1": Part("block.3"), "fc2": Part("block.5")},
    width=_width,
    readers=lambda block: {"mlp.pre": ("block.3",)},
)


def _forward(self: ConvNeXt, x: Tensor) -> Tensor:
    if not live(self, "output"):
        return original_method(self, "forward")(x)
    *before, classifier = self.classifier
    features = self.avgpool(self.features(x))
    for layer in before:
        features = layer(features)
    return classifier(changed_features(self, features, x))


OWNER = Family(
    name="deltalens.backbones.torchvision.convnext:OWNER", methods={"forward": _forward}, slots=frozenset({"output"})
)


def _reads_as(block: nn.Module) -> bool:
    steps = tuple(original_class(step).__name__ for step in block.block)
    return original_class(block).forward is CNBlock.forward and steps == _STEPS


def _add_classifier(tower: Tower, path: str, model: ConvNeXt) -> None:
    cls = original_class(model)
    untouched = cls.forward is ConvNeXt.forward and cls._forward_impl is ConvNeXt._forward_impl
    layers = list(model.classifier) if isinstance(model.classifier, nn.Sequential) else []
    if untouched and layers and hasattr(layers[-1], "in_features"):
        tower.classifier = Site(path, model, OWNER, layers[-1].in_features, tower=tower)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all ConvNeXt blocks in the tree."""
    tower = Tower("vision", ChannelsFirst())
    for path, module in model.named_modules():
        if isinstance(module, CNBlock) and _reads_as(module):
            tower.add(path, module, BLOCK, _width(module))
        elif isinstance(module, ConvNeXt):
            _add_classifier(tower, path, module)
    if not tower.blocks:
        return
    blocks = tuple(f"{block.path}." for block in tower.blocks)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not path.startswith(blocks) and "delta" not in path.split("."):
            tower.image = Site(path, module, IMAGE, module.out_channels, tower=tower)
            tower.stem = Site(path, module, STEM, module.out_channels, tower=tower)
            tower.image_size = input_size(model)[1:]
            break
    yield "", tower
