"""torchvision's VisionTransformer: a class token, nn.MultiheadAttention in every block, one image size.

The attention's weights are read as `backbones/multihead.py` says. The model checks the size of its images and has as
many position vectors, so that prompts which enlarge the image (VPT's frame) cannot be used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer

from deltalens.backbones import multihead
from deltalens.backbones.multihead import MULTIHEAD, is_known, keys_values_of, may_keep_class_row_only, self_attention
from deltalens.backbones.unknown import CHANNELS_FIRST_EMBED, CHANNELS_FIRST_PIXELS, UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.output import changed_features, live, pooled
from deltalens.sites.swap import Swapped, original_class, original_method

ONE_SIZE = "timm, whose ViT takes other sizes"


# ------------------------------------------------------------------ the block
def _block_forward(self: EncoderBlock, input: Tensor, keep: int | None = None) -> Tensor:
    slots = self.delta

    def attend(normed: Tensor) -> Tensor:
        return self.dropout(self_attention(slots, self.self_attention, self.ln_1, normed, keep=keep))

    branches = (
        Branch("attention", self.ln_1, attend, nn.Identity()),
        Branch("mlp", self.ln_2, self.mlp, nn.Identity()),
    )
    x = residual_block(slots, slots.layout, input, branches, keep)
    leaves = slots.last and keep is None and not slots.live("tokens.kept")
    return slots.layout.trim(x) if leaves else x


def _parts(block: EncoderBlock) -> dict[str, Part]:
    parts = multihead.parts("self_attention", block.self_attention)
    return parts | {"fc1": Part("mlp.0"), "fc2": Part("mlp.3")}


def _width(block: EncoderBlock) -> int:
    return block.self_attention.embed_dim


BLOCK = Family(
    name="deltalens.backbones.torchvision.vit:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
    parts=_parts,
    width=_width,
    keys_values=lambda block, prompts: keys_values_of(block.self_attention, block.ln_1(prompts)),
    readers=lambda block: {"attention.pre": ("self_attention",), "mlp.pre": ("mlp.0",)},
)


# ------------------------------------------------------------------ the owner of the tokens
def _head_reads_class_row_only(model: VisionTransformer) -> bool:
    """Whether nothing but the class token's row of the last block reaches the output. Hooks on the encoder see all
    tokens."""
    last = model.encoder.layers[-1]
    return (
        isinstance(last, Swapped)
        and BLOCK in type(last)._families
        and not live(model, "pool")
        and original_class(model.encoder).forward is Encoder.forward
        and not model.encoder._forward_hooks
        and not model.encoder._forward_pre_hooks
        and not model.encoder.layers._forward_hooks
        and may_keep_class_row_only(last.delta)
    )


def _forward(self: VisionTransformer, x: Tensor) -> Tensor:
    class_row_only = _head_reads_class_row_only(self)
    if not class_row_only and not live(self, "pool") and not live(self, "output"):
        return original_method(self, "forward")(x)
    images, x = x, self._process_input(x)
    x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
    if class_row_only:
        x = self.encoder.dropout(x + self.encoder.pos_embedding)
        *earlier, last = self.encoder.layers
        for block in earlier:
            x = block(x)
        x = self.encoder.ln(last(x, keep=1))
    else:
        x = self.encoder(x)
    features = pooled(self, x, self.__dict__["delta_layout"])
    features = x[:, 0] if features is None else features
    if not live(self, "output"):
        return self.heads(features)
    *hidden, classifier = self.heads
    for layer in hidden:
        features = layer(features)
    return classifier(changed_features(self, features, images))


OWNER = Family(
    name="deltalens.backbones.torchvision.vit:OWNER",
    methods={"forward": _forward},
    slots=frozenset({"pool", "output"}),
)


# ------------------------------------------------------------------ towers
def _tower(owner: VisionTransformer) -> Tower:
    width, side = owner.hidden_dim, owner.image_size // owner.patch_size
    tower = Tower("vision", Tokens(1), class_token=True, class_tensors=("class_token",))
    for name, block in owner.encoder.layers.named_children():
        path = f"encoder.layers.{name}"
        known = original_class(block).forward is EncoderBlock.forward and is_known(block.self_attention)
        tower.add(path, block, BLOCK if known else UNKNOWN_BLOCK, width, (side, side))
        if known:
            attn = f"{path}.self_attention"
            tower.callers.append(Site(attn, block.self_attention, MULTIHEAD, width, tower=tower))
    tower.patch_size, tower.image_size = (owner.patch_size,) * 2, (owner.image_size,) * 2
    tower.resizable = ONE_SIZE
    tower.embed = Site("conv_proj", owner.conv_proj, CHANNELS_FIRST_EMBED, width, tower=tower)
    tower.image = Site("conv_proj", owner.conv_proj, CHANNELS_FIRST_PIXELS, width, tower=tower)
    if isinstance(owner.conv_proj, nn.Conv2d):
        tower.stem = Site("conv_proj", owner.conv_proj, CHANNELS_FIRST_PIXELS, width, tower=tower)
    if original_class(owner).forward is VisionTransformer.forward:
        tower.owner = Site("", owner, OWNER, width, tower=tower)
        layers = list(owner.heads) if isinstance(owner.heads, nn.Sequential) else []
        if layers and hasattr(layers[-1], "in_features"):
            tower.classifier = Site("", owner, OWNER, layers[-1].in_features, tower=tower)
    return tower


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every VisionTransformer in the tree."""
    for path, owner in model.named_modules():
        if isinstance(owner, VisionTransformer) and len(owner.encoder.layers):
            yield path, _tower(owner)
