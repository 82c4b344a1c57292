"""open_clip's ModifiedResNet (CLIP's RN50 and its kin): bottlenecks with an average pooling, an attention at the end.

    y = block.stream( relu( shortcut(x) + inner(branch(x)) ) )

The slots are those of torchvision's ResNet. The pooling attention reads the weights of its four linear layers itself;
`ATTENTION_POOL` calls them, so that LoRA by layer name and SSF act there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from torch import Tensor, nn

from deltalens.backbones.multihead import split_heads
from deltalens.backbones.pixels import IMAGE, STEM
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.attention import attention
from deltalens.sites.layout import ChannelsFirst
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import is_changed

ONE_SIZE = "another image_size, and leave it at that: open_clip's image towers take one size"


def _block_forward(self: Bottleneck, x: Tensor) -> Tensor:
    slots = self.delta
    u = self.act1(self.bn1(self.conv1(x)))
    u = self.avgpool(self.act2(self.bn2(self.conv2(u))))
    u = slots.chain("mlp.inner", self.bn3(self.conv3(u)), slots.layout)
    shortcut = x if self.downsample is None else self.downsample(x)
    return slots.chain("block.stream", self.act3(u + shortcut), slots.layout)


BLOCK = Family(
    name="deltalens.backbones.open_clip.resnet:BLOCK",
    methods={"forward": _block_forward},
    slots=frozenset({"mlp.inner", "block.stream"}),
    width=lambda block: block.conv3.out_channels,
)


def _attention_pool(self: AttentionPool2d, x: Tensor) -> Tensor:
    """One query, the mean of the map; it and all positions are keys and values."""
    if not any(is_changed(layer) for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj)):
        return original_method(self, "forward")(x)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
    q, k, v = (split_heads(y, self.num_heads) for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
    return self.c_proj(attention(q, k, v, None, 0.0, fused=True).transpose(1, 2).flatten(1))


ATTENTION_POOL = Family(
    name="deltalens.backbones.open_clip.resnet:ATTENTION_POOL", methods={"forward": _attention_pool}
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every ModifiedResNet in the tree."""
    for path, owner in model.named_modules():
        if not isinstance(owner, ModifiedResNet):
            continue
        tower = Tower("vision", ChannelsFirst())
        for name, module in owner.named_modules():
            if isinstance(module, Bottleneck) and original_class(module).forward is Bottleneck.forward:
                tower.add(name, module, BLOCK, module.conv3.out_channels)
            elif isinstance(module, AttentionPool2d) and original_class(module).forward is AttentionPool2d.forward:
                tower.callers.append(Site(name, module, ATTENTION_POOL, module.c_proj.in_features, tower=tower))
        width = owner.conv1.out_channels
        tower.image = Site("conv1", owner.conv1, IMAGE, width, tower=tower)
        tower.stem = Site("conv1", owner.conv1, STEM, width, tower=tower)
        tower.image_size, tower.resizable = (owner.image_size,) * 2, ONE_SIZE
        if tower.blocks:
            yield path, tower
