"""Which of the final tokens a head reads, for methods that offer the choice."""

from __future__ import annotations

from torch import Tensor, nn

from deltalens.methods.base import Placement
from deltalens.sites.anatomy import Anatomy, Tower, require
from deltalens.sites.layout import Layout


class TokenPool(nn.Module):
    """What the head reads of the final tokens (B, N, C): the class token, or the mean of some of them, (B, C).

    which: "cls", "patches", "prompts", "patches+prompts" (all but the backbone's own prefix tokens) or "all".
    """

    def __init__(self, which: str, prefix: int):
        super().__init__()
        self.which, self.prefix = which, prefix

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        if self.which == "cls":
            return tokens[:, 0]
        if self.which == "patches+prompts":
            return tokens[:, self.prefix :].mean(1)
        if self.which == "all":
            return tokens.mean(1)
        feature_map, before = layout.split(tokens)
        return feature_map.flatten(1, 2).mean(1) if self.which == "patches" else before[:, self.prefix :].mean(1)

    def extra_repr(self) -> str:
        return self.which


def head_pool(tower: Tower, anatomy: Anatomy, which: str, method: str) -> Placement:
    """A `TokenPool` in place of the pooling of a tower's classifier. TypeError where there is no head, or one that
    reads another width; ValueError for "cls" without a class token."""
    network = type(anatomy.model).__name__
    if tower.classifier is None:
        raise TypeError(f"pool={which!r} changes what a head reads: {network} has none")
    require(tower.classifier, "pool", f"{method} with pool={which!r}", anatomy.model)
    own, width = tower.classifier.width_of("pool"), tower.blocks[-1].width
    if own != width:
        raise TypeError(
            f"pool={which!r} gives features of {width} channels, and the head of {network} reads {own}: the class "
            "tokens and the maximum over the patches; leave pool out, or take DAPT, whose head is its own"
        )
    if which == "cls" and not tower.class_token:
        raise ValueError(f"pool='cls' reads the class token, which {network} does not have")
    return tower.classifier, "pool", TokenPool(which, tower.layout.prefix)
