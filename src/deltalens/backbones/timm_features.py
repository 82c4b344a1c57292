"""timm's `features_only` networks: the blocks of a classifier under other paths."""

from __future__ import annotations

import re

from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import nn


def canonical_names(model: nn.Module, path: str = ""):
    """A function from parameter paths of `model` to the paths they have in the plain classifier.

    `FeatureGetterNet` keeps the classifier as `model`; `FeatureListNet` folds `layers.0` into `layers_0`.
    path: where the feature network sits in `model`, if not at its root.
    """
    network = model.get_submodule(path) if path else model
    start = f"{path}." if path else ""

    if isinstance(network, FeatureGetterNet):
        return lambda name: name.removeprefix(start).removeprefix("model.")
    if isinstance(network, FeatureDictNet):
        return lambda name: re.sub(r"^(\w+)_(\d+)(?=\.|$)", r"\1.\2", name.removeprefix(start))
    return lambda name: name.removeprefix(start)
