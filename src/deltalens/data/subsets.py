"""A share of the training images of every class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from deltalens.data.splits import Splits, strata


@dataclass(frozen=True)
class TrainingSubset:
    """Which training images are used. fraction: this share of every class, in (0, 1]; None: all. seed: draws them.
    (So many images of every class: `ReadOptions.shots`.)

    Drawn are the first round(fraction * n), but at least one, of the n images of a class, in an order that depends on
    the images and the seed alone. So the parts are nested: what 10 % holds, 25 % holds too. Of images with several
    labels the rarest one is the class; those without any are a class of their own.

    Raises ValueError for fractions out of range.
    """

    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"the fraction of training images must lie above 0 and not above 1, got {self.fraction:g}")

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.fraction is None

    @classmethod
    def of_origin(cls, origin: Mapping[str, Any]) -> TrainingSubset:
        """The subset that `Splits.origin` of a training run speaks of."""
        return cls(**(origin.get("training_subset") or {}))

    def take(self, splits: Splits) -> Splits:
        """The splits with fewer training images; val and test are as they were. After `Splits.joined`, the subset is
        one of train and val together."""
        if self.whole:
            return splits
        facts = {name: value for name, value in vars(self).items() if value is not None}
        drawn = {"training_subset": facts, "training_images_in_all": len(splits.train)}
        return replace(splits, train=self.of(splits.train), origin=splits.origin | drawn)

    def of(self, images: Any) -> Any:
        """The same of one dataset, in its order."""
        if self.whole:
            return images
        indices = self.indices(_labels(images))
        return images.subset(indices) if hasattr(images, "subset") else Subset(images, indices)

    def indices(self, labels: list[Any]) -> list[int]:
        """Ascending indices of the images that are used."""
        members: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(strata(labels)):
            members[label].append(index)
        random = np.random.default_rng(self.seed)
        share = 1 if self.fraction is None else self.fraction
        found: list[int] = []
        for label in sorted(members):
            order = random.permutation(len(members[label]))
            found += [members[label][i] for i in order[: max(1, round(share * len(order)))]]
        return sorted(found)


def _labels(images: Dataset) -> list[Any]:
    """The labels of a dataset: its own list, else those of its items, each of which is then read once."""
    own = getattr(images, "labels", None)
    return list(own) if own is not None else [images[index][1] for index in range(len(images))]  # type: ignore[arg-type]
