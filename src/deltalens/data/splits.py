"""Train, validation and test parts of one dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


@dataclass
class Splits:
    """What a training run reads. Items are (input, label) pairs.

    task "classification": labels are integers that index `class_names`. "multilabel": labels are int8 tensors
    (classes,) of 1 (there), 0 (not there) and -1 (left out of loss and metrics). "segmentation": the label is a mask;
    "detection", "instance": a dictionary of boxes (`deltalens.data.dense_items`); "oriented": of oriented boxes.
    val is the part that choices are made on, None where nothing is left to choose; test, where there is one, is looked
    at once, at the end. origin: JSON-able facts about how the parts came to be (format, seed, fractions), kept with
    the adapter.
    """

    train: Dataset
    val: Dataset | None
    class_names: list[str]
    test: Dataset | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    task: str = "classification"

    def joined(self) -> Splits:
        """Train and val together for training and none for validation: the protocol "trainval" of a last run, whose
        settings were chosen before."""
        return replace(self, train=self.train + self.val, val=None, origin=self.origin | {"protocol": "trainval"})


def strata(labels: Sequence[Any]) -> list[int]:
    """What to stratify a split by: the label; of several labels the one that is rarest over all items, -1 for none."""
    if not len(labels) or not torch.is_tensor(labels[0]):
        return [int(label) for label in labels]
    there = torch.stack(list(labels)) == 1
    counts = there.sum(0)
    rarity = torch.where(there, counts, len(labels) + 1)
    return torch.where(there.any(1), rarity.argmin(1), -1).tolist()


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
