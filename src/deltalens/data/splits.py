"""Train, validation and test parts of one dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset


@dataclass
class Splits:
    """What a training run reads. Items are (input, label) pairs with integer labels that index `class_names`.

    val is the part that choices are made on; test, where there is one, is looked at once, at the end.
    origin: JSON-able facts about how the parts came to be (seed, fractions), kept with the adapter.
    """

    train: Dataset
    val: Dataset
    class_names: list[str]
    test: Dataset | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def stratified_split(labels: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Indices of len(fractions) + 1 disjoint parts, the remainder first, the same share of every class in each.

    A part gets round(fraction * n) items of a class with n items, and at least one where n leaves one for every part;
    the remainder is never empty. The same labels, fractions and seed give the same parts.

    Raises ValueError where the fractions leave nothing for the first part.
    """
    if any(not 0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        raise ValueError(f"split fractions must lie in [0, 1) and sum to less than 1, got {tuple(fractions)}")
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[int(label)].append(index)
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for label in sorted(members):
        shuffled = [members[label][i] for i in random.permutation(len(members[label]))]
        for part, fraction in enumerate(fractions, 1):
            wanted = round(fraction * len(members[label]))
            if fraction and len(members[label]) > len(fractions):
                wanted = max(1, wanted)
            wanted = min(wanted, len(shuffled) - 1)
            parts[part] += shuffled[:wanted]
            shuffled = shuffled[wanted:]
        parts[0] += shuffled
    return [sorted(part) for part in parts]
