"""An image tower and a text tower side by side, for prompts that stand in both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Site, Tower, require
from deltalens.sites.layout import Layout


def image_tower(anatomy: Anatomy, method: str) -> Tower:
    """The image tower. TypeError for towers whose blocks take no tokens (a ResNet), or where there is none."""
    tower = next((tower for tower in anatomy.towers if tower.name == "vision"), None)
    name = type(getattr(anatomy.model, "clip", anatomy.model)).__name__
    if tower is None:
        raise TypeError(f"{method} needs an image tower beside the text tower, and {name} has none that is known")
    block = tower.blocks[0]
    if "tokens.in" not in block.slots:
        raise TypeError(
            f"{method} puts tokens into an image tower of transformer blocks; that of {name} is made of "
            f"{type(block.module).__name__}, as ResNet towers are, which take none: use CoOp, CoCoOp or KgCoOp there"
        )
    return tower


def embedding_site(tower: Tower, method: str, model: nn.Module) -> Site:
    """Where tokens are put beside the embedded patches, before the first norm."""
    sites = [site for site in (tower.owner, tower.embed) if site is not None]
    chosen = next((site for site in sites if "embed" in site.slots), (sites or tower.blocks)[0])
    require(chosen, "embed", method, model)
    return chosen


def check_added(x: Tensor, layout: Layout, count: int, method: str) -> None:
    """ValueError where other tokens than a method's own stand behind the prefix: it finds its own by their place."""
    if layout.added(x) != count:
        raise ValueError(
            f"{method} finds its {count} tokens right behind the class token, and {layout.added(x)} tokens were added "
            "there: another adapter adds some, too; use one of the two"
        )


def replaced(x: Tensor, tokens: Tensor, start: int) -> Tensor:
    """x (B, N, C) with tokens (p, C) in the places start, start + 1, ..."""
    tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :start], tokens, x[:, start + tokens.shape[1] :]], 1)
