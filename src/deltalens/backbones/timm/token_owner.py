"""What timm's token networks have in common around their blocks: patch embedding, last block, head, intermediates."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from timm.models import checkpoint
from torch import Tensor, nn

from deltalens.backbones.pixels import STEM, through_images
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.layout import Tokens
from deltalens.sites.output import live, pooled, through_output
from deltalens.sites.slots import Slots
from deltalens.sites.swap import Swapped, original_class, original_method


# ------------------------------------------------------------------ the patch embedding
def _embed_forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """The image as adapters change it; its grid is recorded."""
    x = through_images(self, x)
    height, width = self.dynamic_feat_size(x.shape[-2:])
    self.__dict__["delta_layout"].record(height, width)
    return original_method(self, "forward")(x, *args, **kwargs)


EMBED = Family(name="deltalens.backbones.timm.token_owner:EMBED", methods={"forward": _embed_forward})
IMAGE = Family(
    name="deltalens.backbones.timm.token_owner:IMAGE", methods={"forward": _embed_forward}, slots=frozenset({"image"})
)  # the same reading: either may be put on top of the other


def new_tower(owner: nn.Module) -> Tower:
    """The tower of a timm network of tokens, without its blocks and its owner."""
    embed, width = owner.patch_embed, owner.embed_dim
    tower = Tower("vision", Tokens(owner.num_prefix_tokens), class_token=owner.cls_token is not None)
    tower.class_tensors = ("cls_token",) if tower.class_token else ()
    tower.patch_size, tower.image_size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if getattr(embed, "strict_img_size", False):
        dynamic = hasattr(owner, "dynamic_img_size")
        tower.resizable = "dynamic_img_size=True" if dynamic else "another img_size"
    tower.embed = Site("patch_embed", embed, EMBED, width, tower=tower)
    tower.image = Site("patch_embed", embed, IMAGE, width, tower=tower)
    if isinstance(getattr(embed, "proj", None), nn.Conv2d):
        tower.stem = _stem(embed, width, tower)
    return tower


def _stem(embed: nn.Module, width: int, tower: Tower) -> Site | None:
    """The convolution that reads the pixels: the embedding's own, unless a network stands before it (hybrids). None
    where that is no plain convolution: padding that depends on the image is unknown to modules beside it."""
    if not hasattr(embed, "backbone"):
        return Site("patch_embed.proj", embed.proj, STEM, width, tower=tower)
    convolutions = [(path, m) for path, m in embed.backbone.named_modules() if isinstance(m, nn.Conv2d)]
    path, first = next(((path, m) for path, m in convolutions if "delta" not in path.split(".")), ("", None))
    if first is None or original_class(first).forward is not nn.Conv2d.forward:
        return None
    return Site(f"patch_embed.backbone.{path}", first, STEM, first.out_channels, tower=tower)


# ------------------------------------------------------------------ the last block
def leave(slots: Slots, x: Tensor, keep: int | None) -> Tensor:
    """What leaves a block: the last one drops the tokens that adapters added, unless the head reads them."""
    leaves = slots.last and keep is None and not slots.live("tokens.kept")
    return slots.layout.trim(x) if leaves else x


def head_reads_class_row_only(model: nn.Module, base: type, blocks: Collection[Family]) -> bool:
    """Whether nothing but the class token's row of the last block reaches the output of `forward`.

    base: the class whose methods are known to do so. blocks: families whose forward takes keep=1.
    """
    cls, last = original_class(model), model.blocks[-1] if len(model.blocks) else None
    methods = ("forward", "forward_features", "forward_head", "pool")
    return (
        isinstance(last, Swapped)
        and any(family in blocks for family in type(last)._families)
        and model.global_pool == "token"
        and getattr(model, "attn_pool", None) is None
        and model.cls_token is not None
        and not live(model, "pool")
        and all(getattr(cls, name, None) is getattr(base, name, None) for name in methods)
        and all(
            getattr(module, "pointwise", False)
            for slot in last.delta._modules
            if slot not in ("attention_prompts", "tokens_in")
            for module in last.delta.live(slot)
        )
    )


# ------------------------------------------------------------------ the owner of the tokens
def logits(self: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """Normed tokens -> logits, by way of the `output` slot."""
    if not live(self, "output"):
        return self.forward_head(tokens)
    return through_output(self, self.forward_head(tokens, pre_logits=True), images)


def whole_forward(self: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """The model's own forward, with the `output` slot."""
    if not live(self, "output"):
        return original_method(self, "forward")(x, **kwargs)
    return logits(self, x, self.forward_features(x, **kwargs))


def pool(self: nn.Module, x: Tensor, pool_type: str | None = None) -> Tensor:
    """`pool` of a model that has it, with the slot of that name."""
    features = pooled(self, x, self.__dict__["delta_layout"]) if pool_type is None else None
    return original_method(self, "pool")(x, pool_type) if features is None else features


def forward_head(self: nn.Module, x: Tensor, pre_logits: bool = False) -> Tensor:
    """`forward_head` of a model that pools there, with the slot `pool`."""
    features = pooled(self, x, self.__dict__["delta_layout"])
    if features is None:
        return original_method(self, "forward_head")(x, pre_logits)
    features = self.head_drop(self.fc_norm(features))
    return features if pre_logits else self.head(features)


def intermediates(
    self: nn.Module,
    x: Tensor,
    indices: Any,
    return_prefix_tokens: bool,
    norm: bool,
    stop_early: bool,
    output_fmt: str,
    intermediates_only: bool,
    **kwargs: Any,
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """timm's forward_intermediates without the tokens that adapters added: (final tokens, maps, prefix tokens)."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    result = original_method(self, "forward_intermediates")(
        x, indices, bool(self.num_prefix_tokens), norm, stop_early, "NLC", intermediates_only, **kwargs
    )
    layout = self.__dict__["delta_layout"]
    final, taken = (None, result) if intermediates_only else result
    maps, prefixes = [], []
    for item in taken:
        tokens, prefix = item if isinstance(item, tuple) else (item, None)
        feature_map, _ = layout.split(tokens)
        maps.append(feature_map.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature_map.flatten(1, 2))
        prefixes.append(prefix)
    return None if intermediates_only else layout.trim(final), maps, prefixes


def forward_intermediates(
    self: nn.Module,
    x: Tensor,
    indices=None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    **kwargs,
):
    """timm's method; tokens that adapters added to the stream never leave it."""
    final, maps, prefixes = intermediates(
        self, x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, **kwargs
    )
    with_prefix = return_prefix_tokens and bool(self.num_prefix_tokens)
    taken = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
    return taken if intermediates_only else (final, taken)


def class_row(owner: nn.Module, x: Tensor, settings: Callable[[int], dict]) -> Tensor:
    """The stream after all blocks, of the last one its first row only. settings: index of a block -> what its forward
    gets besides."""
    last = len(owner.blocks) - 1
    for i, block in enumerate(owner.blocks):
        given = settings(i) | ({"keep": 1} if i == last else {})
        x = checkpoint(block, x, **given) if owner.grad_checkpointing else block(x, **given)
    return x


def owner_family(name: str, forward: Callable, **methods: Callable) -> Family:
    """The family of a model that owns tokens, with the slots of its head."""
    methods = {"forward": forward, "forward_intermediates": forward_intermediates, **methods}
    return Family(name=name, methods=methods, slots=frozenset({"pool", "output"}))


def set_owner(tower: Tower, owner: nn.Module, family: Family, base: type, without_head: Family) -> None:
    """Make a model the owner of its tokens, where its methods are those that the family reads.

    base: the class that the family knows. without_head: the family of subclasses with a head of their own.
    """
    cls = original_class(owner)

    def same(*names: str) -> bool:
        return all(getattr(cls, name, None) is getattr(base, name, None) for name in names)

    if not same("forward_intermediates"):
        return
    if same("forward", "forward_features", "forward_head", "pool"):
        tower.owner = tower.classifier = Site("", owner, family, owner.embed_dim, tower=tower)
    else:
        tower.owner = Site("", owner, without_head, owner.embed_dim, tower=tower)
