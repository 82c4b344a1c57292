"""What each block of a tower makes of images or texts, one row a sample.

Stages in order: "embed", what enters the first block; "1" to "L", what leaves each block; and what leaves the tower:
"proj", the projection of a two-tower model before it is normalised, or "head", what a classifier layer reads.

Rows are raw: no norm follows a block's output. Of an image tower with a class token it is that token, of others the
mean over the map, without tokens that adapters or the backbone put before it. Of a text tower it is the word that the
text's features are read from, CLIP's end of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltalens.backbones.class_prompts import ClassPrompts
from deltalens.backbones.describe import describe
from deltalens.backbones.text_pass import CHUNK, Kept, TextPass
from deltalens.backbones.two_towers import TextReading, two_towers_of
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.lifecycle.state import KEY, state_of
from deltalens.lifecycle.wrapped import plain_layers
from deltalens.sites.anatomy import Site, Tower
from deltalens.sites.attention import Keep
from deltalens.sites.layout import Layout, Words
from deltalens.sites.slots import Slots
from deltalens.studies.embeddings import classifier_layer

EMBED, PROJECTION, HEAD = "embed", "proj", "head"


@dataclass(frozen=True)
class Stages:
    """A tower's features of n samples. names: of the stages, in order. features: (n, d) of each, float32; d may differ
    from stage to stage."""

    tower: str
    names: tuple[str, ...]
    features: tuple[np.ndarray, ...]


# ------------------------------------------------------------------ images
@torch.no_grad()
def image_stages(model: nn.Module, batches: Iterable[Tensor]) -> Stages:
    """The image tower's stages of batches of images (B, C, H, W), in eval mode, with the adapters that are active.

    Raises TypeError for a network whose blocks are not called, or whose streams do not begin with the batch, and
    ValueError for no images.
    """
    tower, seen = _image_tower(model), _Rows()
    device = next(model.parameters()).device
    names = [EMBED, *(str(i + 1) for i in range(len(tower.blocks)))]
    first, end = tower.blocks[0], HEAD
    handles = [
        first.module.register_forward_pre_hook(
            lambda _, args, options: seen.put(EMBED, _image_rows(_stream(args, options), first, seen.batch)),
            with_kwargs=True,
        )
    ]
    for name, site in zip(names[1:], tower.blocks, strict=True):
        handles.append(site.module.register_forward_hook(_output_hook(seen, name, site)))
    if isinstance(model, ZeroShotClassifier):
        end = PROJECTION
    else:
        layer = classifier_layer(model)
        handles.append(layer.register_forward_pre_hook(lambda _, args: seen.put(HEAD, args[0].flatten(1))))
    try:
        model.eval()
        for images in batches:
            seen.batch = len(images)
            if isinstance(model, ZeroShotClassifier):
                seen.put(PROJECTION, _one_each(model.raw_image_features(images.to(device))))
            else:
                model(images.to(device))
            seen.close([*names, end], tower)
    finally:
        for handle in handles:
            handle.remove()
    return seen.stages(tower.name, [*names, end])


def _image_tower(model: nn.Module) -> Tower:
    """The first tower that reads images. An adapter may have been attached to the other tower alone."""
    if KEY in model.__dict__:
        state = state_of(model)
        with plain_layers(model):
            towers = describe(model, state.backbone, state.blocks).towers
    else:
        towers = describe(model).towers
    found = [tower for tower in towers if not isinstance(tower.layout, Words)]
    if not found:
        raise TypeError(f"{type(model).__name__} has no image tower that is known inside")
    return found[0]


def _output_hook(seen: _Rows, name: str, site: Site) -> Callable[..., None]:
    return lambda _, __, output: seen.put(name, _image_rows(output, site, seen.batch))


def _stream(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return args[0] if args else next(value for value in options.values() if isinstance(value, Tensor))


def _image_rows(output: object, site: Site, batch: int) -> Tensor:
    """(B, d) of a block's stream. Some blocks return more beside it (prompts, attention weights)."""
    x = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(x, Tensor) or len(x) != batch or x.dim() < 3 or site.tower is None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{type(site.module).__name__} ({site.path}) has a stream of {shape} for {batch} images: one with the "
            "batch in front was expected"
        )
    if site.tower.class_token:
        return x[:, 0]
    layout = _layout(site, site.tower)
    x = layout.features(layout.trim(x))
    x = x[:, layout.prefix :] if x.dim() == 3 else x
    return x.flatten(1, -2).mean(1)


def _layout(site: Site, tower: Tower) -> Layout:
    """The layout that the adapters of the model read, which knows the grid of the present images."""
    slots = _slots(site.module)
    if slots is not None:
        return slots.layout
    owners = [each.module.__dict__.get("delta_layout") for each in (tower.embed, tower.owner) if each is not None]
    recorded = next((each for each in owners if each is not None), tower.layout)
    return site.family.layout or recorded


# ------------------------------------------------------------------ texts
@torch.no_grad()
def text_stages(model: ZeroShotClassifier, texts: Iterable[ClassPrompts]) -> Stages:
    """The text tower's stages of texts, in eval mode, with the adapters that are active.

    It is the classifier's own pass, with its exact shortcuts: of the last block it may compute the row alone that is
    read. Raises TypeError for a tower that is not known inside, and for words that depend on images (CoCoOp).
    """
    reading = readable_texts(model)
    if reading is None:
        raise TypeError(
            f"the text tower of {type(model.clip).__name__} is not known inside, so that its blocks cannot be looked "
            "at: analyse the image tower alone"
        )
    if any(getattr(module, "reads_images", False) for module in model.live("text.context")):
        raise TypeError("the adapter writes the texts anew for each image: analyse the image tower alone")
    model.eval()
    blocks = list(reading.blocks(model.clip))
    numbers = {id(block): str(i + 1) for i, block in enumerate(blocks)}
    names, seen = [EMBED, *numbers.values(), PROJECTION], _Rows()
    parts = [_some(each, slice(i, i + CHUNK)) for each in texts for i in range(0, len(each.ids), CHUNK)]
    for part in parts:
        places = torch.arange(len(part.ids), device=part.ends.device), part.ends

        def run(
            clip: nn.Module, block: nn.Module, x: Tensor, mask: Tensor | None, keep: Keep | None, places: Any = places
        ) -> Tensor:
            if block is blocks[0]:
                seen.put(EMBED, x[places])
            y = reading.run(clip, block, x, mask, keep)
            seen.put(numbers[id(block)], y[places] if keep is None else y[:, 0])
            return y

        text_pass = TextPass(model.clip, replace(reading, run=run), _slots(model), model.layout, Kept())
        features = _one_each(text_pass.features(part))
        for module in model.live("text.output"):
            features = module(features)
        seen.put(PROJECTION, features)
        seen.close(names, None)
    return seen.stages("text", names)


def _some(prompts: ClassPrompts, which: slice) -> ClassPrompts:
    """Some of the texts, as a pass reads them. Words of adapters go by the length of the name in each text."""
    lengths = prompts.name_lengths[which] if prompts.single else prompts.name_lengths
    return replace(prompts, ids=prompts.ids[which], ends=prompts.ends[which], name_lengths=lengths)


def readable_texts(model: nn.Module) -> TextReading | None:
    """The steps of the model's text tower; None where it has none, or one that is not known inside."""
    return two_towers_of(model.clip).reading(model.clip) if isinstance(model, ZeroShotClassifier) else None


def _slots(module: nn.Module) -> Slots | None:
    slots = module._modules.get("delta")
    return slots if isinstance(slots, Slots) else None


# ------------------------------------------------------------------ rows
class _Rows:
    """Rows by stage, batch by batch. batch: samples of the present one."""

    def __init__(self) -> None:
        self.batch = 0
        self.present: dict[str, Tensor] = {}
        self.past: dict[str, list[Tensor]] = {}

    def put(self, name: str, rows: Tensor) -> None:
        self.present[name] = rows.float().cpu()

    def close(self, names: list[str], tower: Tower | None) -> None:
        """The batch has passed; every stage must have been seen."""
        missing = [name for name in names if name not in self.present]
        if missing:
            where = f" ({tower.blocks[int(missing[0]) - 1].path})" if tower and missing[0].isdigit() else ""
            raise TypeError(f"stage {missing[0]!r}{where} was not called in a forward pass, so that it has no features")
        for name in names:
            self.past.setdefault(name, []).append(self.present[name])
        self.present = {}

    def stages(self, tower: str, names: list[str]) -> Stages:
        if not self.past:
            raise ValueError("there is nothing to compute features of")
        return Stages(tower, tuple(names), tuple(torch.cat(self.past[name]).numpy() for name in names))


def _one_each(features: Tensor) -> Tensor:
    """(n, D); of K pairs (n, K, D) their mean."""
    return features if features.dim() == 2 else features.mean(1)
