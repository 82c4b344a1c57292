"""What methods for point clouds have in common: the tower they are for, and which tokens their heads read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Site, Tower, require
from deltalens.sites.layout import Layout

READINGS = ("mean", "max", None)


def point_towers(anatomy: Anatomy, method: str) -> list[tuple[Tower, Site]]:
    """The point transformers of a model, each with the module that owns its tokens. TypeError where there is none."""
    found = [(tower, tower.owner) for tower in anatomy.towers if tower.owner is not None]
    found = [(tower, owner) for tower, owner in found if "patches" in owner.slots]
    if not found:
        raise TypeError(
            f"{method} works on patches of point clouds, which {type(anatomy.model).__name__} does not have: take a "
            "point transformer, such as deltalens/points-mini or points/point-mae; for images there are Adapter-X, "
            "AdaptFormer and VPT"
        )
    return found


def require_class_token(tower: Tower, method: str, anatomy: Anatomy) -> None:
    """ValueError where a point transformer has no class token."""
    if not tower.class_token:
        raise ValueError(
            f"{method} needs a class token, which this {type(anatomy.model).__name__} does not have: build it with "
            "class_tokens=('cls',)"
        )


def classifier_of(tower: Tower, method: str, anatomy: Anatomy) -> Site:
    """The owner of the head. TypeError where there is no head, or one of the model's own kind."""
    if tower.classifier is None:
        raise TypeError(
            f"{method} has a head that reads class token, prompts and patches, and {type(anatomy.model).__name__} has "
            "none to replace: create the model with num_classes"
        )
    require(tower.classifier, "pool", method, anatomy.model)
    return tower.classifier


def class_vectors(head: nn.Module) -> int:
    """How many class tokens a point transformer's own head reads: all vectors but the patches' one."""
    return head.vectors - 1


class ReadTokens(nn.Module):
    """What the head reads of the final tokens (B, N, C), side by side: the class tokens (all k of them), one vector of
    the prompts between them and the patches, one of the patches. (B, (k or 0) C + ...)

    prompts, patches: "mean" or "max" over them, None for nothing.
    """

    def __init__(self, class_tokens: bool, prompts: str | None, patches: str | None):
        super().__init__()
        self.class_tokens, self.prompts, self.patches = class_tokens, prompts, patches

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        first = layout.prefix + layout.added(tokens)
        vectors = [tokens[:, : layout.prefix].flatten(1)] if self.class_tokens else []
        for reading, part in ((self.prompts, tokens[:, layout.prefix : first]), (self.patches, tokens[:, first:])):
            if reading is not None:
                vectors.append(part.mean(1) if reading == "mean" else part.amax(1))
        return torch.cat(vectors, 1)

    def extra_repr(self) -> str:
        return f"class_tokens={self.class_tokens}, prompts={self.prompts!r}, patches={self.patches!r}"
