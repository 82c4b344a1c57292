"""A model seen from outside: its towers, their blocks, and which slots each block offers."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from deltalens.sites.layout import Layout


@dataclass(frozen=True)
class Part:
    """A linear part of a block that weight methods may change: a layer, or some rows of a fused one.

    path: the layer's path inside the block ("attn.qkv"). rows: the output rows that belong to the part, None for all.
    """

    path: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of module we can read: what its swapped class overrides and which slots it offers.

    name: "package.module:VARIABLE" of this very object, so that swapped models can be pickled.
    methods: name -> function that the swapped class gets; for blocks, `forward` is the reading of the equation.
    slots: the slots that exist here. Weight slots are listed by `parts`, not here.
    parts: block -> {"q": Part("attn.qkv", (0, d)), ...}.
    width: block -> channels of its stream.
    keys_values: (block, prompts (1 or B, p, C)) -> (k, v) that those prompts become in the block's attention, for
        families whose attention takes prompts; merging stores them as constants.
    readers: block -> {"mlp.pre": ("mlp.fc1",), ...}: for each `pre` slot the paths of all linear layers that read
        what comes out of it, and nothing else does; merging folds affine modules of the slot into them. Paths that
        a block lacks are passed over.
    companions: path inside the module -> family of the module there, swapped together with it: an attention that must
        take further keys and values and still be called as a module, because hooks listen to it.
    layout: how the stream looks inside these blocks, where that differs from the rest of their tower (blocks on
        channels-last maps among convolutions); None for the tower's layout.
    widths: block -> {slot: channels} for slots on a stream of another width than the block's, in blocks that change it.
    before_merge: called with each swapped module before adapters are folded into layers. A family whose module splices
        a bias into a layer of its own turns the module into an equal one whose layer has that bias.
    innermost: the reading goes around the module's own forward and inside all others', in whatever order they come;
        those get at it by `inner_method`.
    """

    name: str
    methods: Mapping[str, Callable]
    slots: frozenset[str] = frozenset()
    parts: Callable[[nn.Module], dict[str, Part]] = lambda block: {}
    width: Callable[[nn.Module], int] | None = None
    keys_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
    readers: Callable[[nn.Module], dict[str, tuple[str, ...]]] = lambda block: {}
    companions: Mapping[str, Family] = field(default_factory=dict)
    layout: Layout | None = None
    widths: Callable[[nn.Module], dict[str, int]] = lambda block: {}
    before_merge: Callable[[nn.Module], None] = lambda module: None
    innermost: bool = False

    def __reduce__(self):
        return pkgutil.resolve_name, (self.name,)

    def __deepcopy__(self, memo):
        return self


@dataclass(eq=False)
class Site:
    """A module of the model where adapters can be placed.

    path: its path from the model. width: channels of the stream there. index: its place in the tower, from 0.
    uncalled: paths inside the module of linear layers that its forward is known to bypass, reading their weights
        itself.
    grid: (height, width) of the map here for images of the model's own size, None where unknown.
    """

    path: str
    module: nn.Module
    family: Family
    width: int
    index: int = 0
    tower: Tower | None = None
    uncalled: frozenset[str] = frozenset()
    grid: tuple[int, int] | None = None

    @property
    def slots(self) -> frozenset[str]:
        return self.family.slots | {f"weights:{part}" for part in self.parts}

    @property
    def parts(self) -> dict[str, Part]:
        return self.family.parts(self.module)

    def width_of(self, slot: str) -> int:
        """Channels of the stream that a slot is on."""
        return self.family.widths(self.module).get(slot, self.width)

    @property
    def layout(self) -> Layout | None:
        """How the stream looks here; None for a site of no tower."""
        return self.family.layout or (self.tower.layout if self.tower is not None else None)

    @property
    def is_last(self) -> bool:
        return self.tower is not None and self.tower.blocks[-1] is self


@dataclass(eq=False)
class Tower:
    """One stream with its blocks and its layout.

    root: path of the part of the model that the tower is made of.
    embed: the module that records the token grid, or None where the layout needs none.
    callers: modules that read the weights of their layers themselves, such as nn.MultiheadAttention, each with a
        reading that calls the layers; swapped when a layer in them is changed.
    carriers: sites besides the blocks that must be swapped where tokens live on between blocks (patch merging, the
        model that owns the tokens), so that nobody outside sees those tokens.
    blocks_count_tokens: whether every block behind added tokens must be swapped too, because it makes or receives
        something of the stream's length (a mask, a position bias).
    classifier: the model that reads this stream for its head and offers the slots `pool` and `output`, or None.
    patch_size: (h, w) of the patch embedding's kernel where known; VPT's initialisation reads it.
    class_token: whether the first prefix token is a class token.
    class_tensors: paths of the parameters that are the class token: its start, and its position where that is a tensor
        of its own.
    image: the module that receives the pixels and offers the slot `image`: f(image) -> image. None where unknown.
    stem: the convolution that reads the pixels and offers the slot `stem.parallel`: f(image) -> what is added to its
        output. None where there is none.
    image_size: (height, width) of the images the model was made for.
    always: sites that are swapped with every adapter, whatever it places: attention modules that read the weight of a
        layer instead of calling it, or that count tokens (rotary embeddings, position biases).
    untrained: paths of tensors that no pretraining has set (class tokens that a checkpoint lacks); they are trained and
        saved with every adapter, as a head is.
    resizable: the setting without which this model refuses images of another size, such as
        "dynamic_img_size=True"; empty for a model that takes other sizes as it is.
    """

    name: str
    layout: Layout
    blocks: list[Site] = field(default_factory=list)
    embed: Site | None = None
    owner: Site | None = None
    callers: list[Site] = field(default_factory=list)
    carriers: list[Site] = field(default_factory=list)
    always: list[Site] = field(default_factory=list)
    classifier: Site | None = None
    patch_size: tuple[int, int] | None = None
    class_token: bool = False
    class_tensors: tuple[str, ...] = ()
    image: Site | None = None
    stem: Site | None = None
    image_size: tuple[int, int] | None = None
    resizable: str = ""
    blocks_count_tokens: bool = False
    root: str = ""
    untrained: list[str] = field(default_factory=list)

    def add(
        self, path: str, module: nn.Module, family: Family, width: int, grid: tuple[int, int] | None = None
    ) -> None:
        self.blocks.append(Site(path, module, family, width, len(self.blocks), self, grid=grid))

    def sites(self) -> Iterator[Site]:
        """Every site of the tower, blocks first."""
        yield from self.blocks
        sites = (self.embed, self.owner, self.classifier, self.image, self.stem)
        yield from (site for site in sites if site is not None)
        yield from self.callers
        yield from self.carriers
        yield from self.always


@dataclass(eq=False)
class Anatomy:
    """What `deltalens.backbones.describe` finds in a model.

    heads: paths of the classifier layers, more than one in distilled networks, none without a classifier. outside:
        paths of the modules outside the backbone, where attach was given a submodule; they are trained and saved like
        a head. outside_tensors: paths of parameters outside the backbone that belong to a module around it, and of
        those in it that no pretraining has set.
    canonical: parameter path in this model -> path in the plain classifier of the same architecture, so that
        adapters travel between a classifier and its `features_only` form.
    parts: paths of what is adapted where that is not all of the backbone: the towers that attach was given.
    """

    model: nn.Module
    towers: list[Tower]
    heads: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    canonical: Callable[[str], str] = str
    outside_tensors: list[str] = field(default_factory=list)
    parts: tuple[str, ...] = ()

    def blocks(self) -> list[Site]:
        return [block for tower in self.towers for block in tower.blocks]

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(path, parameter) of the backbone proper: no adapter, no head, and of the chosen towers only."""
        heads = tuple(path + "." for path in self.head_paths())
        parts = tuple(path + "." for path in self.parts)
        for path, parameter in self.model.named_parameters():
            if parts and not path.startswith(parts):
                continue
            if "delta" not in path.split(".") and not path.startswith(heads) and path not in self.outside_tensors:
                yield path, parameter

    @property
    def head(self) -> str | None:
        """Path of the first classifier layer, None where there is none."""
        return self.heads[0] if self.heads else None

    def head_paths(self) -> list[str]:
        return [*self.outside, *self.heads]


def having(blocks: Sequence[Site], slots: Iterable[str]) -> list[Site]:
    """The blocks that a method is for which needs some of these slots: in a hybrid network those with attention, or
    with linear layers, while blocks of convolutions are passed over.

    A block that shows nothing of its inside is not passed over, and where no block offers any of the slots all are
    returned: `require` then names the first one.
    """
    wanted = set(slots)
    if not any(block.slots & wanted for block in blocks):
        return list(blocks)
    return [block for block in blocks if block.slots & wanted or block.slots <= {"block.stream"}]


def require(site: Site, slot: str, method: str, model: nn.Module) -> None:
    """Raise TypeError naming method, model, block and slot where a block does not offer the slot."""
    if slot in site.slots:
        return
    raise TypeError(
        f"{method} needs the slot {slot!r}, which {type(site.module).__name__} ({site.path}) of "
        f"{type(model).__name__} does not offer. It offers: {', '.join(sorted(site.slots))}"
    )


def prefixed(prefix: str, towers: Iterable[Tower]) -> list[Tower]:
    """Towers of a submodule, with paths as seen from the whole model."""
    towers = list(towers)
    for tower in towers:
        tower.root = ".".join(part for part in (prefix, tower.root) if part)
        tower.untrained = [".".join(part for part in (prefix, path) if part) for path in tower.untrained]
        tower.class_tensors = tuple(f"{prefix}.{path}" if prefix else path for path in tower.class_tensors)
    for site in {id(site): site for tower in towers for site in tower.sites()}.values():
        site.path = ".".join(part for part in (prefix, site.path) if part)
    return towers
