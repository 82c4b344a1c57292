"""VPT, visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import nn

from deltalens.methods.base import Method, Placement, check_choices, register, setting
from deltalens.methods.token_pool import head_pool
from deltalens.methods.vpt_pixels import Frame, ImageChannels, PatchPrompts, is_patch_embedding
from deltalens.methods.vpt_prompts import (
    AddedToken,
    AddedTokens,
    PrefixKeysValues,
    Projection,
    Prompts,
    init_bound,
)
from deltalens.methods.vpt_prototypes import fill_prompts
from deltalens.sites.anatomy import Anatomy, Site, Tower, having, require

__all__ = ["Prompts", "VPTConfig", "init_bound"]

IN_BLOCKS = ("prepend", "prefix", "add", "add-1")
IN_PIXELS = ("prepend-pixel", "concat-channel", "padding")
PROTOTYPES = ("final-cls", "cls-nolastl", "cls-nofirstl")
READS_PROMPTS = ("prompts", "patches+prompts", "all")


@register("vpt")
class VPTConfig(Method):
    """Learned tokens beside the patch tokens, in the first block (shallow) or in every block (deep); head trained.

    shallow: p tokens (1, p, C) enter before block 0, after the position embedding, and live on through all blocks.
    deep: block i gets its own p tokens, and what block i-1 made of its prompts is dropped. A prompt then only matters
    as a key and a value of block i's attention: K = W_k LN(P) + b_k, V = W_v LN(P) + b_v. Exactly that is computed
    here, without queries, attention rows or MLP for prompts; outputs and gradients are those of the published form.
    Where prompts live on behind a block (shallow, the last prompted block of a partial depth, a head that pools
    prompts), that one block sees them as tokens.

    Parameters: p C (shallow), p * (sum of block widths) (deep); ViT-B, p=50: 38,400 and 460,800. On Swin, prompts are
    copied into every window with zero relative-position bias; the head pools the prompts that leave the last block
    together with the map, as published. The official Swin code mixes prompts between samples of a batch; this one does
    not.

    location, with shapes per prompted block:

    * prepend: tokens (p, C), as above.
    * prefix: p keys and p values (heads, p, head_dim) each, put into the attention directly. The paper does not say
      whether K and V share a vector; here they are two tensors. No norm and no projection acts on them.
    * add: a vector for each prefix and map token (prefix + H W, C), added. add-1: one vector (1, C) for all.
    * prepend-pixel: p pictures of patch size, through the frozen patch embedding, without position embedding.
    * concat-channel (official `below`): num_tokens further image channels (1, p, H, W) and the weights that read them;
      the first convolution's weight and bias are trained too.
    * padding (official `pad`): a frame of num_tokens pixels; the image grows by 2p on each axis.

    The last three have one place only and want deep=False. The official reverse depth replaces image patches by
    prompts; here it inserts them.
    """

    learning_rate: ClassVar = 1e-2

    num_tokens: int = setting(
        default=50,
        help="prompts per prompted block, p; padding: width of the frame; concat-channel: number of channels; "
        "add and add-1 do not read it",
    )
    deep: bool = setting(default=True, help="prompts in every block instead of the first only")
    location: str = setting(default="prepend", help="where prompts act", choices=(*IN_BLOCKS, *IN_PIXELS))
    shared: str | None = setting(
        default=None,
        help="intra: one vector p times in a block; inter: the same prompts in all blocks; all: both",
        choices=(None, "intra", "inter", "all"),
    )
    depth: int | None = setting(default=None, help="prompt this many blocks only, counted from the input; None: all")
    reverse: bool = setting(default=False, help="count depth from the output")
    keep_prompts: bool = setting(default=True, help="prompts live on behind the last prompted block")
    project: int | None = setting(default=None, help="width of the prompts, with one linear layer to the stream's")
    dropout: float = setting(default=0.0, help="dropout on the prompts, one mask per sample and block")
    init: str = setting(
        default="uniform",
        help="uniform; gaussian or imagenet for pixels; final-cls, cls-nolastl, cls-nofirstl: class prototypes, "
        "computed by prepare",
        choices=("uniform", "gaussian", "imagenet", *PROTOTYPES),
    )
    train_prompts: bool = setting(default=True, help="False: prompts stay at their start, only the head is trained")
    pool: str | None = setting(
        default=None,
        help="tokens that the head reads; None: as the backbone's head does",
        choices=(None, "cls", "patches", *READS_PROMPTS),
    )

    def __post_init__(self):
        check_choices(self)
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("depth", "project"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}")
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        at, pixels = f"location={self.location!r}", self.location in IN_PIXELS
        tokens = self.location in ("prepend", "prefix")
        yield pixels and self.deep, f"{at} has one place only, before the blocks: pass deep=False"
        yield (
            self.depth is not None and not self.deep,
            f"depth={self.depth} counts the prompted blocks of the deep form: leave it out for the shallow one, or "
            "pass deep=True",
        )
        yield self.reverse and self.depth is None, "reverse=True counts depth from the output: pass depth= too"
        yield (
            not self.keep_prompts and (self.location != "prepend" or (self.deep and self.depth is None)),
            "keep_prompts=False removes prompts behind the last prompted block: it needs location='prepend' with "
            "depth= or deep=False",
        )
        yield (
            self.shared in ("intra", "all") and not tokens,
            f"shared={self.shared!r} repeats one vector p times: it needs location='prepend' or 'prefix'; one vector "
            "for all tokens is location='add-1'",
        )
        yield (
            self.shared in ("inter", "all") and not self.deep,
            f"shared={self.shared!r} shares prompts between blocks: pass deep=True",
        )
        yield (
            self.project is not None and self.location not in ("prepend", "add", "add-1"),
            f"project= makes tokens of narrow prompts: it needs location='prepend', 'add' or 'add-1', not {at}",
        )
        yield pixels and self.dropout > 0, f"dropout acts on tokens, which {at} does not train: pass dropout=0"
        yield (
            self.init in ("gaussian", "imagenet") and self.location not in ("prepend-pixel", "padding"),
            f"init={self.init!r} is for pixels: it needs location='prepend-pixel' or 'padding', not {at}",
        )
        yield (
            self.init in PROTOTYPES
            and (self.location != "prepend" or self.shared is not None or self.project is not None),
            f"init={self.init!r} puts a class prototype in place of each prompt: it needs location='prepend' without "
            "shared= and project=",
        )
        yield (
            not self.train_prompts and (self.location == "concat-channel" or self.project is not None),
            "train_prompts=False trains the head only, and location='concat-channel' and project= have further tensors "
            "to train",
        )
        yield (
            self.pool in ("prompts", "patches+prompts")
            and (self.location not in ("prepend", "prepend-pixel") or not self.keep_prompts),
            f"pool={self.pool!r} reads prompts at the end of the network: it needs location='prepend' or "
            "'prepend-pixel' and keep_prompts=True",
        )

    # ------------------------------------------------------------------ where
    def place(self, anatomy: Anatomy):
        if self.location in ("concat-channel", "padding"):
            yield from self._place_at_the_image(anatomy)
        else:
            for number, tower in enumerate(anatomy.towers):
                yield from self._place_in_blocks(number, tower, anatomy)
        if self.pool is not None:
            for tower in anatomy.towers:
                yield head_pool(tower, anatomy, self.pool, "VPT")

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        if self.location != "concat-channel":
            return ()
        stems = {tower.stem.path: tower.stem.module for tower in anatomy.towers if tower.stem is not None}
        return [f"{path}.{name}" for path, conv in stems.items() for name, _ in conv.named_parameters(recurse=False)]

    def prepare(self, model: nn.Module, loader: Iterable) -> None:
        """Start prompts from class prototypes, where `init` asks for it; those that have their start keep it. loader:
        yields (images, labels)."""
        if self.init in PROTOTYPES:
            fill_prompts(model, loader, self.num_tokens)

    # ------------------------------------------------------------------ in the blocks
    def _prompted(self, tower: Tower) -> list[Site]:
        blocks = self._fitting(tower)
        count = 1 if not self.deep else len(blocks) if self.depth is None else self.depth
        if count > len(blocks):
            raise ValueError(f"depth={count} is more than the {len(blocks)} blocks there are")
        return blocks[-count:] if self.reverse else blocks[:count]

    def _fitting(self, tower: Tower) -> list[Site]:
        """The blocks that prompts are for; in hybrid networks those with attention."""
        return having(tower.blocks, ["attention.prompts" if self.location in ("prepend", "prefix") else "tokens.in"])

    def _place_in_blocks(self, number: int, tower: Tower, anatomy: Anatomy) -> Iterator[Placement]:
        blocks = self._prompted(tower)
        widths = [block.width_of("attention.prompts") for block in blocks]
        project = None if self.project is None else Projection(self.project, widths)
        shared: dict[tuple[int, ...], nn.Module] = {}
        for block in blocks:
            slot = self._slot(block, blocks[-1])
            kind = f"with location={self.location!r}" if self.location != "prepend" else ""
            require(block, slot, f"VPT-{'deep' if self.deep else 'shallow'} {kind}".strip(), anatomy.model)
            if self.shared not in ("inter", "all"):
                yield block, slot, self._module(block, project, number)
                continue
            shape = self._shape(block)
            if shape not in shared:
                shared[shape] = self._module(block, project, number)
            if len(shared) > 1:
                raise ValueError(
                    f"shared={self.shared!r} uses the same prompts in all blocks, and those of "
                    f"{type(anatomy.model).__name__} want different shapes: {', '.join(map(str, shared))}"
                    + ("; pass project=k" if self.location in ("prepend", "add-1") else "")
                )
            yield block, slot, shared[shape]

    def _slot(self, block: Site, last: Site) -> str:
        if self.location != "prepend":
            return "attention.prompts" if self.location == "prefix" else "tokens.in"
        if self.pool is None:
            pooled = bool(block.tower.carriers)  # the head pools what becomes of the last prompts
        else:
            pooled = self.pool in READS_PROMPTS
        lives_on = block is last and self.keep_prompts and (pooled or block is not self._fitting(block.tower)[-1])
        return "tokens.in" if lives_on else "attention.prompts"

    def _shape(self, block: Site) -> tuple[int, ...]:
        """Of the learned tensor: (tokens, width), or (heads, p, head_dim) for keys and values."""
        width = self.project or block.width_of("attention.prompts")
        count = 1 if self.shared in ("intra", "all") or self.location == "add-1" else self.num_tokens
        if self.location == "prefix":
            reference = next(block.module.parameters())
            zero = torch.zeros(1, count, width, device=reference.device, dtype=reference.dtype)
            with torch.no_grad():
                return tuple(block.family.keys_values(block.module, zero)[0].shape[1:])
        if self.location == "add":
            if block.grid is None:
                raise ValueError(
                    f"location='add' has a vector for each token of the map, and the map of {block.path} has no known "
                    "size; use location='add-1'"
                )
            count = block.tower.layout.prefix + block.grid[0] * block.grid[1]
        return count, width

    def _module(self, block: Site, project: Projection | None, number: int) -> nn.Module:
        shape, trained = self._shape(block), self.train_prompts
        bound = init_bound(block.tower.patch_size or (16, 16), self.project or block.tower.blocks[0].width)
        copies = self.num_tokens if self.shared in ("intra", "all") else 1
        if self.location == "prepend-pixel":
            embed = block.tower.image.module if block.tower.image else None
            if not is_patch_embedding(embed, block.tower.layout):
                raise TypeError(f"location='prepend-pixel' needs a patch embedding; {block.path} has none before it")
            return PatchPrompts(embed, self.num_tokens, self.init, bound, trained)
        if self.location == "prefix":
            return PrefixKeysValues(shape, bound, self.dropout, copies=copies, trained=trained)
        options = {"project": project, "trained": trained}
        if self.location == "add":
            return AddedTokens(block.tower.layout.prefix, block.grid, shape[1], bound, self.dropout, **options)
        if self.location == "add-1":
            return AddedToken(*shape, bound, self.dropout, **options)
        source = self._source(block, number)
        return Prompts(*shape, bound, self.dropout, copies=copies, source=source, **options)

    def _source(self, block: Site, number: int) -> tuple[int, str, int] | None:
        if self.init not in PROTOTYPES:
            return None
        width = block.width_of("attention.prompts")
        if self.init == "cls-nofirstl" and block.width != width:
            raise ValueError(
                f"init='cls-nofirstl' starts the prompts of {block.path}, {width} wide, from the block's output, "
                f"{block.width} wide; use init='cls-nolastl' here"
            )
        if self.init != "final-cls":
            return number, "inputs" if self.init == "cls-nolastl" else "outputs", block.index
        last = block.tower.blocks[-1]
        if last.width != width:
            raise ValueError(
                f"init='final-cls' starts the prompts of {block.path}, {width} wide, from the last block's "
                f"output, {last.width} wide; use init='cls-nolastl' or 'cls-nofirstl' here"
            )
        return number, "outputs", last.index

    # ------------------------------------------------------------------ around the blocks
    def _place_at_the_image(self, anatomy: Anatomy) -> Iterator[Placement]:
        placed: set[nn.Module] = set()
        for tower in anatomy.towers:
            site = tower.image if self.location == "padding" else tower.stem
            if site is None:
                what = "module that receives the pixels" if self.location == "padding" else "first convolution"
                raise TypeError(
                    f"location={self.location!r} needs the {what} of {type(anatomy.model).__name__}: not found"
                )
            if site.module in placed:
                continue
            placed.add(site.module)
            size = tower.image_size
            if size is None:
                raise TypeError(f"location={self.location!r} needs the image size that the model was made for")
            if self.location == "concat-channel":
                bound = init_bound(site.module.kernel_size, tower.blocks[0].width)
                yield site, "stem.parallel", ImageChannels(site.module, self.num_tokens, size, bound)
            else:
                self._check_growth(tower, anatomy)
                channels = tower.stem.module.in_channels if tower.stem is not None else 3
                yield site, "image", Frame(channels, size, self.num_tokens, self.init, self.train_prompts)

    def _check_growth(self, tower: Tower, anatomy: Anatomy) -> None:
        """Whether the model takes the larger image."""
        grown, name = [side + 2 * self.num_tokens for side in tower.image_size], type(anatomy.model).__name__
        if tower.resizable:
            raise ValueError(
                f"location='padding' makes images of {grown[0]}x{grown[1]} pixels, and this {name} takes "
                f"{tower.image_size[0]}x{tower.image_size[1]} only: create it with {tower.resizable}"
            )
        patch = tower.patch_size or (1, 1)
        pads = getattr(tower.image.module, "dynamic_img_pad", True)
        if not pads and any(2 * self.num_tokens % side for side in patch):
            raise ValueError(
                f"location='padding' makes images of {grown[0]}x{grown[1]} pixels, which patches of "
                f"{patch[0]}x{patch[1]} do not divide: choose num_tokens so that 2 * num_tokens is a multiple of them, "
                "or create the model with dynamic_img_pad=True"
            )
