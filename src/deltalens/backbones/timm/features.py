"""timm's `features_only` networks: the blocks of a classifier under other paths."""

from __future__ import annotations

import re
from collections.abc import Callable

from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import nn


def canonical_names(model: nn.Module, path: str = "") -> Callable[[str], str]:
    """A function from parameter paths of `model` to the paths they have in the plain classifier.

    `FeatureGetterNet` keeps the classifier as `model`; `FeatureListNet` folds `layers.0` into `layers_0`.
    path: where the backbone sits in `model`, if not at its root; names outside it start with `outside.`, so that a
    head's `norm` is not taken for the backbone's.
    """
    network = model.get_submodule(path) if path else model
    start = f"{path}." if path else ""

    def canonical(name: str) -> str:
        if not name.startswith(start):
            return f"outside.{name}"
        name = name.removeprefix(start)
        if isinstance(network, FeatureGetterNet):
            return name.removeprefix("model.")
        if isinstance(network, FeatureDictNet):
            return re.sub(r"^(\w+)_(\d+)(?=\.|$)", r"\1.\2", name)
        return name

    return canonical
