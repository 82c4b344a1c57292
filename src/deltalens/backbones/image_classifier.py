"""A classifier made of class names as a plain image classifier: nothing of the texts is left but one matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.cosines import cosines
from deltalens.backbones.two_towers import two_towers_of


class ImageClassifier(nn.Module):
    """logits = normalize(image(x)) @ weight^T + bias, with the `output` and `logits` modules that were active.

    clip: a two-tower model, of which a copy without its text tower is kept. weight: (C, D), class features times the
    scale, or (C, K, D) where K tokens of an image are read. bias: a number, or None.
    """

    def __init__(
        self,
        clip: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        output: Iterable[nn.Module],
        logits: Iterable[nn.Module],
        class_names: tuple[str, ...],
    ):
        super().__init__()
        self.clip = without_texts(clip)
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.output, self.logits = (nn.ModuleList(copy.deepcopy(list(modules))) for modules in (output, logits))
        self.class_names, self.num_classes = class_names, len(class_names)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        features = two_towers_of(self.clip).image(self.clip, images)
        for module in self.output:
            features = module(features, images)
        features = F.normalize(features, dim=-1)
        logits = cosines(features, self.weight)
        logits = logits if self.bias is None else logits + self.bias
        for module in self.logits:
            logits = module(logits, features)
        return logits


def without_texts(clip: nn.Module) -> nn.Module:
    """A copy of a two-tower model, of which `image` of its reading works, and no more. Texts of a tower that is not
    known inside stay."""
    reading = two_towers_of(clip).reading(clip)
    parts = [] if reading is None else reading.parts(clip)
    return copy.deepcopy(clip, {id(part): None for part in parts})  # what is taken for copied already is not copied
