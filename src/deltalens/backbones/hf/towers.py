"""What the ViT-like towers of transformers have in common: embeddings, blocks, a model that records, a classifier.

`output_hidden_states` and `output_attentions` record what blocks and attentions return, by hooks. Where adapters add
tokens to the stream, the recording model cuts them out of what was recorded, so that shapes are the backbone's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from deltalens.backbones.pixels import STEM, through_images
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.layout import Sequence, Tokens
from deltalens.sites.output import live, pooled
from deltalens.sites.swap import original_class, original_method

# ------------------------------------------------------------------ embeddings
_STEMS = ("patch_embeddings.projection", "patch_embeddings", "patch_embedding")


def stem_of(embeddings: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """(path inside the embeddings, convolution) of what turns pixels into patches."""
    found = ((path, _at(embeddings, path)) for path in _STEMS)
    return next(((path, module) for path, module in found if isinstance(module, nn.Conv2d)), None)


def _embed_forward(self: nn.Module, pixel_values: Tensor, *args, **kwargs):
    conv = stem_of(self)[1]
    height, width = (size // step for size, step in zip(pixel_values.shape[-2:], conv.stride, strict=True))
    self.__dict__["delta_layout"].record(height, width)
    return original_method(self, "forward")(pixel_values, *args, **kwargs)


EMBED = Family(name="deltalens.backbones.hf.towers:EMBED", methods={"forward": _embed_forward})


def _embed_with_slot(self: nn.Module, pixel_values: Tensor, *args, **kwargs) -> Tensor:
    tokens = _embed_forward(self, pixel_values, *args, **kwargs)
    return self.delta.tokens("embed", tokens, self.__dict__["delta_layout"])


EMBED_WITH_SLOT = Family(
    name="deltalens.backbones.hf.towers:EMBED_WITH_SLOT",
    methods={"forward": _embed_with_slot},
    slots=frozenset({"embed"}),
)  # of towers whose embeddings return tokens with positions, before the first norm


# ------------------------------------------------------------------ the model that records hidden states and attentions
def _model_forward(self: nn.Module, *args, **kwargs):
    """The image as adapters change it; what was recorded, without the tokens that adapters added."""
    if live(self, "image"):
        if args:
            args = (through_images(self, args[0]), *args[1:])
        else:
            kwargs["pixel_values"] = through_images(self, kwargs["pixel_values"])
    wanted = kwargs.pop("return_dict", None)
    wanted = getattr(self.config, "return_dict", True) if wanted is None else wanted
    output = original_method(self, "forward")(*args, return_dict=True, **kwargs)
    layout = self.__dict__.get("delta_layout") or self.delta.layout
    if isinstance(layout, Tokens):
        _trim_recorded(output, layout)
    if live(self, "pool"):
        output.pooler_output = pooled(self, self.post_layernorm(output.last_hidden_state), layout)
        output.last_hidden_state = layout.trim(output.last_hidden_state)
    return output if wanted else output.to_tuple()


def _trim_recorded(output, layout: Tokens) -> None:
    own = layout.prefix + layout.grid[0] * layout.grid[1]
    states, attentions = output.get("hidden_states"), output.get("attentions")
    if states and any(x is not None and x.shape[1] > own for x in states):
        output.hidden_states = tuple(x if x is None or x.shape[1] <= own else layout.trim(x) for x in states)
    if attentions and any(x is not None and x.shape[-1] > own for x in attentions):
        output.attentions = tuple(_of_own_tokens(x, own, layout.prefix) for x in attentions)


def _of_own_tokens(weights: Tensor | None, own: int, prefix: int) -> Tensor | None:
    """Attention weights (B, heads, queries, keys) without the rows and columns of added tokens."""
    for axis in (-1, -2):
        if weights is not None and weights.shape[axis] > own:
            size = weights.shape[axis]
            kept = weights.narrow(axis, 0, prefix), weights.narrow(axis, size - own + prefix, own - prefix)
            weights = torch.cat(kept, axis)
    return weights


OWNER = Family(name="deltalens.backbones.hf.towers:OWNER", methods={"forward": _model_forward})
POOLING_OWNER = Family(
    name="deltalens.backbones.hf.towers:POOLING_OWNER", methods={"forward": _model_forward}, slots=frozenset({"pool"})
)  # of towers that norm the class token last, in `post_layernorm`
IMAGE = Family(
    name="deltalens.backbones.hf.towers:IMAGE", methods={"forward": _model_forward}, slots=frozenset({"image"})
)  # the same reading: either may be put on top of the other


# ------------------------------------------------------------------ classifiers
@dataclass(frozen=True)
class Reading:
    """How a ...ForImageClassification forms its logits.

    base: name of the backbone in it. output: class of what it returns. features: (model, output of the backbone) ->
    features (B, C). of_pooled: (model, what a `pool` module returns) -> features, None where the slot `pool` is not
    offered. loss_options: whether further keywords go to the loss. layout: model -> layout of the tokens that a `pool`
    module gets.
    """

    base: str
    output: type
    features: Callable[[nn.Module, object], Tensor]
    of_pooled: Callable[[nn.Module, Tensor], Tensor] | None = lambda model, features: features
    loss_options: bool = True
    layout: Callable[[nn.Module], Tokens] = lambda model: model.delta.layout


def classifier_family(name: str, cls: type, reading: Reading) -> Family:
    """The reading of a classifier with the slots `pool` and `output`. What it returns has the library's own type."""

    @functools.wraps(cls.forward)
    @can_return_tuple
    def forward(self: nn.Module, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs):
        if not live(self, "pool") and not live(self, "output"):
            return original_method(self, "forward")(pixel_values, labels=labels, **kwargs)
        outputs = getattr(self, reading.base)(pixel_values, **kwargs)
        if live(self, "pool"):
            features = reading.of_pooled(self, pooled(self, outputs.last_hidden_state, reading.layout(self)))
        else:
            features = reading.features(self, outputs)
        for module in live(self, "output"):
            features = module(features, pixel_values)
        logits, loss = self.classifier(features), None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **(kwargs if reading.loss_options else {}))
        recorded = ("hidden_states", "attentions", "reshaped_hidden_states")
        kept = {key: outputs.get(key) for key in recorded if key in reading.output.__dataclass_fields__}
        return reading.output(loss=loss, logits=logits, **kept)

    slots = {"output"} if reading.of_pooled is None else {"pool", "output"}
    return Family(name=name, methods={"forward": forward}, slots=frozenset(slots))


def classifier_site(model: nn.Module, classes: dict[type, Family], tower: Tower) -> Site | None:
    """The classifier around a tower, of one of the classes that are known by their forward."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls in classes and isinstance(getattr(module, "classifier", None), nn.Module):
            width = getattr(module.classifier, "in_features", None)
            if width is not None:
                return Site(path, module, classes[cls], width, tower=tower)
    return None


# ------------------------------------------------------------------ towers
@dataclass(frozen=True)
class Kind:
    """One kind of tower, found by the class of its embeddings.

    layer, attention: classes of a block and of its attention at the path `attention_path`. family: the reading of a
    block. linears: paths of layers without which a block is of another version and counts as unknown. prefix:
    embeddings -> number of class, distillation and register tokens. class_token: name of the class
    token among the embeddings' parameters, empty where there is none. recorder: path in the model of what records
    hidden states. classifiers: class -> reading. resizable: the setting without which other image sizes are refused.
    embed, owner: how the embeddings and what records hidden states are read.
    """

    embeddings: type
    layer: type
    attention: type
    attention_path: str
    family: Family
    prefix: Callable[[nn.Module], int]
    linears: tuple[str, ...] = ()
    recorder: str = ""
    classifiers: dict[type, Family] | None = None
    class_token: str = "cls_token"
    resizable: str = ""
    embed: Family = EMBED
    owner: Family = OWNER

    def family_of(self, block: nn.Module) -> Family:
        attention = getattr(block, self.attention_path, None)
        known = (
            original_class(block).forward is self.layer.forward
            and attention is not None
            and original_class(attention).forward is self.attention.forward
            and all(_at(block, path) is not None for path in self.linears)
        )
        return self.family if known else UNKNOWN_BLOCK

    def find_towers(self, model: nn.Module) -> Iterator[tuple[str, Tower]]:
        """One tower for every module with embeddings of this kind. Paths count from `model`."""
        for path, embeddings in model.named_modules():
            if isinstance(embeddings, self.embeddings):
                tower = self._tower(model, path, embeddings)
                if tower.blocks:
                    yield "", tower

    def _tower(self, model: nn.Module, path: str, embeddings: nn.Module) -> Tower:
        owner_path = path.rpartition(".")[0]
        owner = model.get_submodule(owner_path)
        stem, config = stem_of(embeddings), owner.config
        tower = Tower("vision", Sequence() if stem is None else Tokens(self.prefix(embeddings)))
        tower.class_token, tower.root = bool(self.class_token), owner_path
        tower.class_tensors = (f"{path}.{self.class_token}".lstrip("."),) if self.class_token else ()
        grid = None
        if stem is not None:
            tower.patch_size, tower.image_size = tuple(stem[1].kernel_size), pair(config.image_size)
            grid = tuple(a // b for a, b in zip(tower.image_size, tower.patch_size, strict=True))
        for name, block in owner.named_modules():
            if isinstance(block, self.layer):
                width = config.hidden_size
                tower.add(f"{owner_path}.{name}".lstrip("."), block, self.family_of(block), width, grid)
        width = config.hidden_size
        if stem is not None:
            tower.embed = Site(path, embeddings, self.embed, width, tower=tower)
            recorder = f"{owner_path}.{self.recorder}".strip(".")
            tower.owner = Site(recorder, model.get_submodule(recorder), self.owner, width, tower=tower)
            tower.image = Site(owner_path, owner, IMAGE, width, tower=tower)
            tower.stem = Site(f"{path}.{stem[0]}".lstrip("."), stem[1], STEM, width, tower=tower)
            tower.resizable = self.resizable
            tower.blocks_count_tokens = True
        tower.classifier = classifier_site(model, self.classifiers or {}, tower)
        return tower


def pair(size) -> tuple[int, int]:
    """An image size of a configuration as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _at(block: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


def leave(self: nn.Module, x: Tensor) -> Tensor:
    """A block's output; the last block drops the tokens that adapters added, unless a `pool` module reads them."""
    slots = self.delta
    return slots.layout.trim(x) if slots.last and not slots.live("tokens.kept") else x


def identity(x: Tensor) -> Tensor:
    return x


def layer_parts(attention: str, out: str, mlp: dict[str, str]) -> Callable[[nn.Module], dict[str, Part]]:
    """Parts of blocks with separate projections; those of the MLP that a block lacks are passed over.

    mlp: part -> path in the block."""

    def parts(block: nn.Module) -> dict[str, Part]:
        found = {name: Part(f"{attention}.{name}_proj") for name in "qkv"} | {"proj": Part(f"{attention}.{out}")}
        return found | {name: Part(path) for name, path in mlp.items() if _at(block, path) is not None}

    return parts


def readers(attention: str, *mlp: str) -> Callable[[nn.Module], dict[str, tuple[str, ...]]]:
    """The layers that read what comes out of `attention.pre` and `mlp.pre`."""
    qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
    return lambda block: {"attention.pre": qkv, "mlp.pre": mlp}
