"""open_clip's towers of transformer blocks: the image tower `VisionTransformer`, and text towers.

The image tower's last block computes the class token's row only where nothing else is read: pooling "tok" without an
attentional pooler, and no tokens returned (CoCa). It takes images of one size. A text tower's stream is a plain
sequence: methods with spatial modules are an error there, and so are tokens put into the stream, because mask and
pooling count words from the front; prompts of `attention.prompts` are keys and values only, which every word sees.

In a whole CLIP both towers are adapted; `backbone="visual"` adapts the image tower alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from open_clip.transformer import CustomTransformer, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltalens.backbones.multihead import may_keep_class_row_only
from deltalens.backbones.open_clip.blocks import BLOCK, CUSTOM_BLOCK, add_block
from deltalens.backbones.unknown import CHANNELS_FIRST_EMBED, CHANNELS_FIRST_PIXELS
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.layout import Tokens, Words
from deltalens.sites.output import live, pooled
from deltalens.sites.swap import Swapped, original_class, original_method

ONE_SIZE = "another image_size, and leave it at that: open_clip's image towers take one size"


# ------------------------------------------------------------------ the owner of the image tokens
def _reads_class_row_only(model: VisionTransformer) -> bool:
    """Whether nothing but the class token's row of the last block reaches the output. Hooks on the transformer see
    all tokens."""
    last, cls = model.transformer.resblocks[-1], original_class(model)
    return (
        isinstance(last, Swapped)
        and any(family in type(last)._families for family in (BLOCK, CUSTOM_BLOCK))
        and model.pool_type == "tok"
        and model.attn_pool is None
        and not model.output_tokens
        and not live(model, "pool")
        and cls._pool is VisionTransformer._pool
        and cls._global_pool is VisionTransformer._global_pool
        and original_class(model.transformer).forward is Transformer.forward
        and model.transformer.batch_first
        and not model.transformer._forward_hooks
        and not model.transformer._forward_pre_hooks
        and may_keep_class_row_only(last.delta)
    )


def _forward(self: VisionTransformer, x: Tensor):
    if not _reads_class_row_only(self):
        return original_method(self, "forward")(x)
    x = self._embeds(x)
    *earlier, last = self.transformer.resblocks
    if self.transformer.grad_checkpointing:
        for block in earlier:
            x = checkpoint(block, x, use_reentrant=False)
        x = checkpoint(last, x, keep=1, use_reentrant=False)
    else:
        for block in earlier:
            x = block(x)
        x = last(x, keep=1)
    features, _ = self._pool(x)
    return features if self.proj is None else features @ self.proj


def _embeds(self: VisionTransformer, images: Tensor) -> Tensor:
    """open_clip's embedding; `embed` modules get the tokens with their positions, before the first norm."""
    slots = self._modules.get("delta")
    if not live(self, "embed"):
        return original_method(self, "_embeds")(images)
    x = self.conv1(images).flatten(2).transpose(1, 2)
    first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + self.positional_embedding.to(x.dtype)
    return self.ln_pre(slots.tokens("embed", self.patch_dropout(x), self.__dict__["delta_layout"]))


def _pool(self: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's pooling, or a `pool` module's. Tokens that adapters added are not returned."""
    layout = self.__dict__["delta_layout"]
    if not live(self, "pool"):
        return original_method(self, "_pool")(x)
    normed = x if self.final_ln_after_pool else self.ln_post(x)
    features = pooled(self, normed, layout)
    tokens = layout.trim(normed)
    return (self.ln_post(features) if self.final_ln_after_pool else features), self._global_pool(tokens)[1]


def _forward_intermediates(
    self: VisionTransformer,
    x: Tensor,
    indices=None,
    stop_early: bool = False,
    normalize_intermediates: bool = False,
    intermediates_only: bool = False,
    output_fmt: str = "NCHW",
    output_extra_tokens: bool = False,
) -> dict:
    """open_clip's method; tokens that adapters added to the stream never leave it."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    layout = self.__dict__["delta_layout"]
    x, taken = self.transformer.forward_intermediates(self._embeds(x), indices=indices, stop_early=stop_early)
    taken = [layout.trim(tokens) for tokens in taken]
    taken = [self.ln_post(tokens) for tokens in taken] if normalize_intermediates else taken
    maps = [tokens[:, layout.prefix :] for tokens in taken]
    if output_fmt == "NCHW":
        maps = [tokens.unflatten(1, layout.grid).permute(0, 3, 1, 2).contiguous() for tokens in maps]
    found = {"image_intermediates": maps}
    if output_extra_tokens:
        found["image_intermediates_prefix"] = [tokens[:, : layout.prefix] for tokens in taken]
    if intermediates_only:
        return found
    features, _ = self._pool(x if live(self, "pool") else layout.trim(x))
    found["image_features"] = features if self.proj is None else features @ self.proj
    return found


_METHODS = {
    "forward": _forward,
    "_embeds": _embeds,
    "_pool": _pool,
    "forward_intermediates": _forward_intermediates,
}
OWNER = Family(
    name="deltalens.backbones.open_clip.transformer:OWNER", methods=_METHODS, slots=frozenset({"embed", "pool"})
)  # `pool` takes the place of the class token or the mean
ATTENTIONAL_OWNER = Family(
    name="deltalens.backbones.open_clip.transformer:ATTENTIONAL_OWNER", methods=_METHODS, slots=frozenset({"embed"})
)


# ------------------------------------------------------------------ towers
def _image_tower(owner: VisionTransformer) -> Tower:
    width, conv = owner.transformer.width, owner.conv1
    tower = Tower("vision", Tokens(1), class_token=True, class_tensors=("class_embedding",))
    for i, block in enumerate(owner.transformer.resblocks):
        add_block(tower, f"transformer.resblocks.{i}", block, grid=owner.grid_size)
    tower.patch_size, tower.image_size, tower.resizable = owner.patch_size, owner.image_size, ONE_SIZE
    tower.embed = Site("conv1", conv, CHANNELS_FIRST_EMBED, width, tower=tower)
    tower.image = tower.stem = Site("conv1", conv, CHANNELS_FIRST_PIXELS, width, tower=tower)
    cls = original_class(owner)
    if cls.forward is VisionTransformer.forward and cls._pool is VisionTransformer._pool:
        family = OWNER if owner.attn_pool is None else ATTENTIONAL_OWNER
        tower.owner = Site("", owner, family, width, tower=tower)
        tower.classifier = tower.owner if owner.attn_pool is None else None
    return tower


def _text_tower(transformer: nn.Module, number: int) -> Tower:
    tower = Tower(f"text{number}" if number else "text", Words())
    for i, block in enumerate(transformer.resblocks):
        add_block(tower, f"resblocks.{i}", block, text=True)
    return tower


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path, tower) of every image tower, then of every other stack of these blocks: text encoders and decoders."""
    of_images, texts = set(), 0
    for path, owner in model.named_modules():
        if isinstance(owner, VisionTransformer) and len(owner.transformer.resblocks):
            of_images.add(id(owner.transformer))
            yield path, _image_tower(owner)
    for path, stack in model.named_modules():
        if isinstance(stack, (Transformer, CustomTransformer)) and id(stack) not in of_images and len(stack.resblocks):
            yield path, _text_tower(stack, texts)
            texts += 1
