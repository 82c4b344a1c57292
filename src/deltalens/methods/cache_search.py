"""The search for the alpha and beta of a cache of training images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltalens.backbones.zero_shot import ZeroShotClassifier

if TYPE_CHECKING:
    from deltalens.methods.tip_adapter import FeatureCache


@dataclasses.dataclass(frozen=True)
class CacheSearch:
    """accuracy: share of the validation images that are right with alpha and beta; before: with those of before."""

    alpha: float
    beta: float
    accuracy: float
    before: float


@torch.no_grad()
def searched(
    model: ZeroShotClassifier,
    cache: FeatureCache,
    loader: Iterable[Any],
    highest: tuple[float, float],
    steps: tuple[int, int],
) -> CacheSearch:
    """Give a cache of the model the best alpha and beta; what else adds to the logits stays as it is.

    loader: batches (images, labels). highest, steps: of (alpha, beta). The model is in eval mode. ValueError where
    there are no images.
    """
    own = next(model.parameters())
    parts = []
    for images, labels, *_ in loader:
        features = model.image_features(images.to(own.device, own.dtype))
        logits = model.similarities(features)
        for module in model.live("logits"):
            logits = logits if module is cache else module(logits, features)
        parts.append((logits.float(), cache.affinity(features), torch.as_tensor(labels, device=own.device)))
    if not parts:
        raise ValueError("the loader gave no validation images")
    logits, affinity, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    found = best_alpha_beta(cache, logits, affinity, labels, highest, steps)
    cache.alpha, cache.beta = found.alpha, found.beta
    return found


def best_alpha_beta(
    cache: FeatureCache,
    logits: Tensor,
    affinity: Tensor,
    labels: Tensor,
    highest: tuple[float, float],
    steps: tuple[int, int],
) -> CacheSearch:
    """The grid 0.1 + i (highest - 0.1) / steps of both; of equally good pairs the one with the smallest beta, then the
    smallest alpha. logits (n, C) without the cache, affinity (n, N), labels (n,)."""
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
