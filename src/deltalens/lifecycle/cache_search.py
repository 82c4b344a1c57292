"""Tip-Adapter's alpha and beta, searched on validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import adapter_of, all_slots
from deltalens.methods.tip_adapter import FeatureCache, TipAdapterConfig


@dataclasses.dataclass(frozen=True)
class CacheSearch:
    """accuracy: share of the validation images that are right with alpha and beta; before: with those of before."""

    alpha: float
    beta: float
    accuracy: float
    before: float


@torch.no_grad()
def search_cache(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    highest: tuple[float, float] = (3.0, 7.0),
    steps: tuple[int, int] = (20, 200),
    name: str | None = None,
) -> CacheSearch:
    """Search the alpha and beta of an adapter with Tip-Adapter and make them its settings; files then hold them.

    loader: batches (images, labels) of validation images, never of the test set. highest, steps: of (alpha, beta), as
    published for most datasets; the grid is 0.1 + i (highest - 0.1) / steps. Of equally good pairs the one with the
    smallest beta, then the smallest alpha, is taken. ValueError without a prepared Tip-Adapter or without images.
    """
    name, adapter = adapter_of(model, name)
    caches = [m for _, slots in all_slots(model) for _, m in slots.of(name) if isinstance(m, FeatureCache)]
    if len(caches) != 1 or not caches[0].filled:
        raise ValueError(f"the adapter {name!r} has no Tip-Adapter that was prepared with training images")
    cache, device, training = caches[0], next(model.parameters()).device, model.training
    model.eval()
    parts = []
    for images, labels, *_ in loader:
        features = model.image_features(images.to(device))
        logits = model.similarities(features)
        for module in model.live("logits"):
            logits = logits if module is cache else module(logits, features)
        parts.append((logits.float(), cache.affinity(features), torch.as_tensor(labels, device=device)))
    model.train(training)
    if not parts:
        raise ValueError("the loader gave no validation images")
    logits, affinity, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    found = best_alpha_beta(cache, logits, affinity, labels, highest, steps)
    cache.alpha, cache.beta = found.alpha, found.beta
    adapter.configs[:] = [
        dataclasses.replace(config, alpha=found.alpha, beta=found.beta)
        if isinstance(config, TipAdapterConfig)
        else config
        for config in adapter.configs
    ]
    return found


def best_alpha_beta(
    cache: FeatureCache,
    logits: Tensor,
    affinity: Tensor,
    labels: Tensor,
    highest: tuple[float, float],
    steps: tuple[int, int],
) -> CacheSearch:
    """logits (n, C) without the cache, affinity (n, N), labels (n,)."""
    alphas, betas = (
        [0.1 + i * (top - 0.1) / count for i in range(count)] for top, count in zip(highest, steps, strict=True)
    )

    def right(beta: float, candidates: list[float]) -> list[int]:
        votes = cache.votes(affinity, logits.shape[1], beta)
        return torch.stack([((logits + alpha * votes).argmax(1) == labels).sum() for alpha in candidates]).tolist()

    best, chosen = -1, (cache.alpha, cache.beta)
    (before,) = right(cache.beta, [cache.alpha])
    for beta in betas:
        for alpha, count in zip(alphas, right(beta, alphas), strict=True):
            if count > best:
                best, chosen = count, (alpha, beta)
    return CacheSearch(*chosen, best / len(labels), before / len(labels))
