"""transformers' ConvNeXt, ConvNeXt V2 and the ConvNeXts of DINOv3: one residual branch, convolution first.

There is no norm(x) for parallel modules, and one branch, called `mlp`. `pre` and `inner` see channels last.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.convnext import modeling_convnext as v1
from transformers.models.convnextv2 import modeling_convnextv2 as v2
from transformers.models.dinov3_convnext import modeling_dinov3_convnext as dinov3

from deltalens.backbones.hf.towers import Reading, classifier_family, classifier_site, pair
from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.layout import ChannelsFirst, ChannelsLast
from deltalens.sites.swap import original_class
from deltalens.sites.weights import LAYER_NORM_AXIS

_CHANNELS_LAST = ChannelsLast()


def _axis(norm: nn.Module) -> int:
    return 1 if norm.data_format == "channels_first" else -1


for _norm in (v1.ConvNextLayerNorm, v2.ConvNextV2LayerNorm, dinov3.DINOv3ConvNextLayerNorm):
    LAYER_NORM_AXIS[_norm.forward] = _axis


def _forward(self: nn.Module, x: Tensor, conv: str, norm: str, down: str, up: str, act: str, scale: str) -> Tensor:
    """x + drop_path(inner(scale * up(act(down(pre(norm(conv(x)))))))), then stream; names are those of the layers."""
    slots = self.delta
    u = getattr(self, norm)(getattr(self, conv)(x).permute(0, 2, 3, 1))
    u = getattr(self, act)(getattr(self, down)(slots.chain("mlp.pre", u, _CHANNELS_LAST)))
    u = getattr(self, up)(self.grn(u) if hasattr(self, "grn") else u)
    gamma = getattr(self, scale, None)
    u = slots.chain("mlp.inner", u if gamma is None else u * gamma, _CHANNELS_LAST).permute(0, 3, 1, 2)
    return slots.chain("block.stream", x + self.drop_path(u), slots.layout)


def _block_forward(self: nn.Module, features: Tensor) -> Tensor:
    return _forward(self, features, "dwconv", "layernorm", "pwconv1", "pwconv2", "act", "layer_scale_parameter")


def _dinov3_forward(self: nn.Module, features: Tensor) -> Tensor:
    layers = ("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2", "activation_fn", "gamma")
    return _forward(self, features, *layers)


def _block(name: str, forward, conv: str, fc1: str, fc2: str) -> Family:
    return Family(
        name=f"deltalens.backbones.hf.convnext:{name}",
        methods={"forward": forward},
        slots=frozenset({"mlp.pre", "mlp.inner", "block.stream"}),
        parts=lambda block: {"fc1": Part(fc1), "fc2": Part(fc2)},
        width=lambda block: getattr(block, conv).out_channels,
        readers=lambda block: {"mlp.pre": (fc1,)},
    )


BLOCK = _block("BLOCK", _block_forward, "dwconv", "pwconv1", "pwconv2")
DINOV3_BLOCK = _block("DINOV3_BLOCK", _dinov3_forward, "depthwise_conv", "pointwise_conv1", "pointwise_conv2")
_LAYERS = {v1.ConvNextLayer: BLOCK, v2.ConvNextV2Layer: BLOCK, dinov3.DINOv3ConvNextLayer: DINOV3_BLOCK}


def _reading(base: str) -> Reading:
    return Reading(
        base,
        ImageClassifierOutputWithNoAttention,
        lambda model, outputs: outputs.pooler_output,
        of_pooled=None,
        loss_options=False,
    )


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.convnext:CLASSIFIER", v1.ConvNextForImageClassification, _reading("convnext")
)
V2_CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.convnext:V2_CLASSIFIER", v2.ConvNextV2ForImageClassification, _reading("convnextv2")
)
_CLASSIFIERS = {v1.ConvNextForImageClassification: CLASSIFIER, v2.ConvNextV2ForImageClassification: V2_CLASSIFIER}


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all ConvNeXt blocks in the tree."""
    tower, stem = Tower("vision", ChannelsFirst()), None
    for path, module in model.named_modules():
        forwards = {cls.forward: (cls, family) for cls, family in _LAYERS.items()}
        cls, family = forwards.get(original_class(module).forward, (None, None))
        if cls is not None and isinstance(module, cls):
            tower.add(path, module, family, family.width(module))
        elif stem is None and isinstance(module, nn.Conv2d) and "delta" not in path.split("."):
            stem = (path, module)  # the first convolution: blocks come later in the tree
    if not tower.blocks:
        return
    path, conv = stem
    if not any(path.startswith(f"{block.path}.") for block in tower.blocks):
        tower.image = Site(path, conv, IMAGE, conv.out_channels, tower=tower)
        tower.stem = Site(path, conv, STEM, conv.out_channels, tower=tower)
        config = getattr(model, "config", None)
        tower.image_size = pair(getattr(config, "image_size", 224))
    tower.classifier = classifier_site(model, _CLASSIFIERS, tower)
    yield "", tower
