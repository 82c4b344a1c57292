"""Tip-Adapter's alpha and beta, searched on validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltalens.lifecycle.state import adapter_of, all_slots
from deltalens.methods.cache_search import CacheSearch, searched
from deltalens.methods.tip_adapter import STEPS, FeatureCache, TipAdapterConfig


def search_cache(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    highest: tuple[float, float] = (3.0, 7.0),
    steps: tuple[int, int] = STEPS,
    name: str | None = None,
) -> CacheSearch:
    """Search the alpha and beta of an adapter with Tip-Adapter and make them its settings; files then hold them.

    `deltalens.finish` does the same by the adapter's own settings, and `deltalens.training.fit` by itself. loader:
    batches (images, labels) of validation images, never of the test set. highest, steps: of (alpha, beta), as
    published for most datasets; the grid is 0.1 + i (highest - 0.1) / steps. Of equally good pairs the one with the
    smallest beta, then the smallest alpha, is taken. ValueError without a prepared Tip-Adapter or without images.
    """
    name, adapter = adapter_of(model, name)
    caches = [m for _, slots in all_slots(model) for _, m in slots.of(name) if isinstance(m, FeatureCache)]
    if len(caches) != 1 or not caches[0].filled:
        raise ValueError(f"the adapter {name!r} has no Tip-Adapter that was prepared with training images")
    training = model.training
    model.eval()
    try:
        found = searched(model, caches[0], loader, highest, steps)
    finally:
        model.train(training)
    adapter.configs[:] = [
        dataclasses.replace(config, alpha=found.alpha, beta=found.beta)
        if isinstance(config, TipAdapterConfig)
        else config
        for config in adapter.configs
    ]
    return found
