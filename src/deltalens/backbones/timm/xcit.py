"""timm's XCiT: cross-covariance attention, local convolutions and an MLP; the class token joins behind the blocks (see
`class_attention`).

Three branches: "attention", "local", "mlp", each with the slots of a branch. Attention weighs channels, not tokens: a
further key without a query has no meaning there, and `attention.prompts` is not offered. Tokens of the stream have one:
prompts that live on (VPT-shallow) count in the covariance of all tokens and pass the MLP. The local branch sees the map
only and adds nothing to them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.xcit import XCA, ConvPatchEmbed, XCABlock, Xcit
from torch import Tensor, nn

from deltalens.backbones.pixels import STEM, through_images
from deltalens.backbones.timm.class_attention import OWNER
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import BRANCH_SLOTS, RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.swap import original_class, original_method


def _block_forward(self: XCABlock, x: Tensor, H: int, W: int) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        return self.gamma1 * self.attn(normed)

    def local(normed: Tensor) -> Tensor:
        start = normed.shape[1] - H * W
        update = self.gamma3 * self.local_mp(normed[:, start:] if start else normed, H, W)
        return torch.cat([torch.zeros_like(normed[:, :start]), update], 1) if start else update

    def mlp(normed: Tensor) -> Tensor:
        return self.gamma2 * self.mlp(normed)

    branches = (
        Branch("attention", self.norm1, attend, self.drop_path1),
        Branch("local", self.norm3, local, self.drop_path3),
        Branch("mlp", self.norm2, mlp, self.drop_path2),
    )
    x = residual_block(slots, slots.layout, x, branches)
    return slots.layout.trim(x) if slots.last else x


def _parts(block: XCABlock) -> dict[str, Part]:
    width = block.attn.qkv.out_features // 3
    parts = {name: Part("attn.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("attn.proj"), "fc1": Part("mlp.fc1"), "fc2": Part("mlp.fc2")}


BLOCK = Family(
    name="deltalens.backbones.timm.xcit:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {f"local.{slot}" for slot in BRANCH_SLOTS},
    parts=_parts,
    width=lambda block: block.attn.qkv.in_features,
    readers=lambda block: {"attention.pre": ("attn.qkv",), "mlp.pre": ("mlp.fc1",)},
)


def _embed_forward(self: ConvPatchEmbed, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The image as adapters change it; its grid is recorded."""
    tokens, (height, width) = original_method(self, "forward")(through_images(self, x))
    self.__dict__["delta_layout"].record(height, width)
    return tokens, (height, width)


EMBED = Family(name="deltalens.backbones.timm.xcit:EMBED", methods={"forward": _embed_forward})
IMAGE = Family(
    name="deltalens.backbones.timm.xcit:IMAGE", methods={"forward": _embed_forward}, slots=frozenset({"image"})
)  # the same reading: either may be put on top of the other


def _known(block: nn.Module) -> bool:
    return original_class(block).forward is XCABlock.forward and original_class(block.attn).forward is XCA.forward


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the network, tower) for every Xcit in the tree. Where one block has a forward of its own, all offer
    their output only: that block could not take tokens that others carry."""
    for path, owner in model.named_modules():
        if not isinstance(owner, Xcit) or not len(owner.blocks):
            continue
        embed, width = owner.patch_embed, owner.embed_dim
        tower, family = Tower("vision", Tokens(0)), BLOCK if all(map(_known, owner.blocks)) else UNKNOWN_BLOCK
        side = embed.patch_size
        grid = (embed.img_size[0] // side, embed.img_size[1] // side)
        for i, block in enumerate(owner.blocks):
            tower.add(f"blocks.{i}", block, family, width, grid)
        conv = embed.proj[0][0]
        tower.patch_size, tower.image_size = (side, side), embed.img_size
        tower.embed = Site("patch_embed", embed, EMBED, width, tower=tower)
        tower.image = Site("patch_embed", embed, IMAGE, width, tower=tower)
        tower.stem = Site("patch_embed.proj.0.0", conv, STEM, conv.out_channels, tower=tower)
        tower.owner = Site("", owner, OWNER, width, tower=tower)
        tower.carriers = [tower.owner]  # every block behind tokens that live on must keep them out of its convolutions
        yield path, tower
