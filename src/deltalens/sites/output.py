"""The end of a classifier: which tokens the head reads, and what becomes of the features it reads.

Two slots of the model that owns the head:

* `pool`: f(tokens (B, N, C) after the final norm, layout) -> features (B, C), instead of its own pooling. Tokens that
  adapters added to the stream are then kept until there, and `forward_features` returns them too.
* `output`: f(features (B, C), images) -> features (B, C), chained, right before the classifier layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltalens.sites.anatomy import Anatomy, Site, require
from deltalens.sites.layout import Layout


def features_site(anatomy: Anatomy, method: str) -> Site:
    """The model that reads the features, which offers `output`; `width_of("output")` is theirs. TypeError where there
    is none."""
    sites = [tower.classifier for tower in anatomy.towers if tower.classifier is not None]
    of_timm = sites and hasattr(sites[0].module, "get_classifier")
    if not sites or (of_timm and not isinstance(sites[0].module.get_classifier(), nn.Module)):
        raise TypeError(
            f"{method} needs the features that a classifier layer reads, and {type(anatomy.model).__name__} has no "
            "such place: use a classifier with timm's interface (forward_features, forward_head, get_classifier)"
        )
    require(sites[0], "output", method, anatomy.model)
    return sites[0]


def live(owner: nn.Module, slot: str) -> list[nn.Module]:
    """The active modules of a slot of the owner; none where nothing was placed in it."""
    slots = owner._modules.get("delta")
    return [] if slots is None else slots.live(slot)


def pooled(owner: nn.Module, tokens: Tensor, layout: Layout) -> Tensor | None:
    """What the last active `pool` module makes of the tokens, None without one."""
    modules = live(owner, "pool")
    return modules[-1](tokens, layout) if modules else None


def changed_features(owner: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """Features as the active `output` modules of the owner make them."""
    for module in live(owner, "output"):
        features = module(features, images)
    return features


def through_output(owner: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """Features -> `output` modules -> logits of the classifier layer."""
    return owner.get_classifier()(changed_features(owner, features, images))


def class_count(model: nn.Module) -> int | None:
    """How many classes a model says it has: `num_classes` in timm, `num_labels` in transformers. None where it says
    nothing."""
    count = getattr(model, "num_classes", None)
    if count is None and getattr(model, "config", None) is not None:
        count = getattr(model, "num_labels", None)
    return count


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: the tensor itself, or the field `logits` of transformers' outputs.

    Raises TypeError for anything else.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__} without logits: use a model with a classifier, such as "
            "transformers' ...ForImageClassification or create_backbone(name, num_classes=...)"
        )
    return logits
