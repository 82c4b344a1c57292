"""Models with an image and a text tower, whatever library they come from: how their two sides are read."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltalens.backbones.class_prompts import Tokenizer
from deltalens.sites.swap import original_class


@dataclass(frozen=True)
class TextReading:
    """The steps of a text tower, so that some of them can be left out or done once. Each takes the whole model.

    parts: every module and parameter of the text side. tokens: the embedding layer. positions: (L_max, d), added to
    embedded tokens. blocks: in order. run: (model, block, x (n, L, d), mask, keep) -> x; keep as in `kept`, only for
    blocks whose reading takes it (`takes_rows`). mask: (model, L) -> additive (L, L) or None. causal: whether words see
    only what stands before them. ends: (model, ids (n, L)) -> positions (n,) that the features are read from. finish:
    (model, rows (..., d)) -> features (..., D): last norm and projection, which act on each row alone.
    """

    parts: Callable[[nn.Module], list[nn.Module | nn.Parameter]]
    tokens: Callable[[nn.Module], nn.Module]
    positions: Callable[[nn.Module], Tensor]
    blocks: Callable[[nn.Module], nn.ModuleList]
    run: Callable[..., Tensor]
    mask: Callable[[nn.Module, int], Tensor | None]
    causal: Callable[[nn.Module], bool]
    ends: Callable[[nn.Module, Tensor], Tensor]
    finish: Callable[[nn.Module, Tensor], Tensor]
    takes_rows: Callable[[nn.Module], bool]


@dataclass(frozen=True)
class TwoTowers:
    """How a library's two-tower model is read.

    image: (model, images (B, C, H, W)) -> features (B, D), not normalised. text: (model, ids (n, L)) -> features
    (n, D), the library's own pass. scale, bias: what cosines are multiplied with, and what is added (SigLIP, or None).
    reading: the text tower's steps, None for towers that are not known inside: their texts are computed whole.
    class_token: the image tower's learned class token (C,) without its position; None where there is none.
    """

    image: Callable[[nn.Module, Tensor], Tensor]
    text: Callable[[nn.Module, Tensor], Tensor]
    scale: Callable[[nn.Module], Tensor]
    bias: Callable[[nn.Module], Tensor | None]
    reading: Callable[[nn.Module], TextReading | None]
    class_token: Callable[[nn.Module], Tensor | None] = lambda model: None


@dataclass(frozen=True)
class NamedTwoTowers:
    """What a library makes of a name: the model, its tokenizer, its image preprocessing, the full name."""

    model: nn.Module
    tokenizer: Tokenizer
    preprocessing: dict[str, Any]
    name: str


# module in which a model's class, or one that it is derived from, is defined -> the file that reads it
READERS: dict[str, str] = {
    "open_clip.model": "deltalens.backbones.open_clip.two_towers",
    "transformers.models.clip.modeling_clip": "deltalens.backbones.hf.two_towers",
    "transformers.models.siglip.modeling_siglip": "deltalens.backbones.hf.two_towers",
}


def two_towers_of(model: nn.Module) -> TwoTowers:
    """How this model is read. TypeError for one that has no two towers that we know."""
    for cls in original_class(model).__mro__:
        if cls.__module__ in READERS:
            reader: Any = sys.modules.get(READERS[cls.__module__])  # torch.compile traces no imports
            reader = importlib.import_module(READERS[cls.__module__]) if reader is None else reader
            found = reader.two_towers(model)
            if found is not None:
                return found
    raise TypeError(
        f"{type(model).__name__} is no two-tower model that is known here: open_clip's CLIP and CustomTextCLIP, "
        "transformers' CLIPModel and SiglipModel are"
    )
