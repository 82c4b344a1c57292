"""Names of a bare transformers model as they are in the classifier of the same architecture."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from deltalens.sites.swap import original_class


def in_classifier(canonical: Callable[[str], str], network: nn.Module) -> Callable[[str], str]:
    """`canonical`, and what it names inside a bare model with the classifier's path in front.

    network: the backbone. Names of what lies around a backbone start with `outside.` and stay."""
    prefix = path_in_classifier(network)
    if not prefix:
        return canonical

    def named(path: str) -> str:
        name = canonical(path)
        return name if name.startswith("outside.") else f"{prefix}.{name}"

    return named


def path_in_classifier(network: nn.Module) -> str:
    """Where `...ForImageClassification` keeps a bare model: "vit" for ViTModel. Empty for anything else.

    It is the class's `base_model_prefix`, except in two-tower models, whose classifier keeps the `vision_model`. A
    bare model is one that owns its embeddings.
    """
    prefix = getattr(network, "base_model_prefix", "")
    if (
        not original_class(network).__module__.startswith("transformers.models.")
        or "embeddings" not in network._modules
    ):
        return ""
    if getattr(network.config, "base_config_key", "") == "vision_config":
        prefix = "vision_model"
    return "" if prefix in network._modules else prefix
