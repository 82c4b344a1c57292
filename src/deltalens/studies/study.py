"""What a study file says: which methods, backbones, datasets and seeds are compared, and how they are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from deltalens.data.subsets import TrainingSubset
from deltalens.methods import FullConfig, Method
from deltalens.training.optim import default_learning_rate
from deltalens.training.settings import TrainingSettings

OWN_RATE = (1.0,)  # lr is left out: the method's own default, and no search


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone by name. label: as tables show it. img_size: None for the model's own. options: for its
    constructor."""

    label: str
    model: str
    img_size: int | None = None
    checkpoint: str | None = None
    pretrained: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetEntry:
    """Images on a disk. min_crop, hflip: where this dataset's augmentation differs from the study's. format: as in
    `deltalens.data.read_data`. protocol: "trainval" trains the final runs on train and val together, once the rate has
    been chosen on val. download: fetch what is not there, where the format knows how."""

    name: str
    path: str
    min_crop: float | None = None
    hflip: float | None = None
    format: str = "auto"
    protocol: str = "val"
    download: bool = False
    subset: TrainingSubset = field(default_factory=TrainingSubset)
    origin: str | None = None

    @property
    def source(self) -> str:
        """The name of the dataset as a whole: what parts of one dataset share."""
        return self.origin or self.name


@dataclass(frozen=True)
class Variant:
    """A row of the table: one method, or several that make one adapter.

    x, curve: where this row lies in the plot of curves. lr: in the place of the method's own default rate.
    """

    label: str
    methods: tuple[Method, ...]
    x: float | None = None
    curve: str | None = None
    lr: float | None = None

    @property
    def base_rate(self) -> float:
        return default_learning_rate(self.methods) if self.lr is None else self.lr

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return any(isinstance(method, FullConfig) for method in self.methods)

    def to_dict(self) -> list[dict[str, Any]]:
        """The methods as JSON-able entries, every setting written out."""
        return [json.loads(json.dumps(method.to_dict())) for method in self.methods]


@dataclass(frozen=True)
class Training:
    """What is the same for every run. The first ones as in `TrainingSettings`, the last ones as in `deltalens
    train`."""

    epochs: int = 20
    batch_size: int = 64
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    optimizer: str = "adamw"
    clip_grad: float = 0.0
    precision: str = "32"
    label_smoothing: float = 0.0
    min_crop: float = 0.5
    hflip: float = 0.5
    rand_augment: int = 0

    def settings(self, lr: float, seed: int, workers: int = 0) -> TrainingSettings:
        """The runner's settings of one run."""
        names = {each.name for each in fields(TrainingSettings)}
        shared = {key: value for key, value in vars(self).items() if key in names}
        return TrainingSettings(**shared, lr=lr, seed=seed, workers=workers, progress=False)


@dataclass(frozen=True)
class Split:
    """How a folder without val or test folders is split: by a seed of its own, so that all runs see the same
    images."""

    seed: int = 0
    val_fraction: float = 0.15
    test_fraction: float = 0.15


@dataclass(frozen=True)
class Study:
    """A checked study file.

    rates: factors on every method's base rate; with more than one the best is chosen on the validation images.
    fixed_rate: the base rate of all methods that name none, in the place of their defaults. reference: the row that the
    report's test compares the others with; without one full fine-tuning, else the first row. scatter: the datasets on
    the axes of the report's plot of two tasks; without them the first two.
    """

    title: str
    backbones: tuple[BackboneEntry, ...]
    datasets: tuple[DatasetEntry, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    training: Training = field(default_factory=Training)
    split: Split = field(default_factory=Split)
    rates: tuple[float, ...] = OWN_RATE
    fixed_rate: float | None = None
    keep_adapters: bool = True
    x_title: str = "x"
    reference: str | None = None
    scatter: tuple[str, str] | None = None

    @property
    def reference_label(self) -> str:
        """The row that others are compared with."""
        full = (variant.label for variant in self.variants if variant.is_full)
        return self.reference or next(full, self.variants[0].label)

    @property
    def scatter_datasets(self) -> tuple[str, str] | None:
        """The two datasets of the plot of two tasks; None where there is but one, whole or in parts."""
        names = list({dataset.source: dataset.name for dataset in self.datasets}.values())  # parts: the largest
        return self.scatter or ((names[0], names[1]) if len(names) > 1 else None)

    def candidates(self, variant: Variant) -> list[float]:
        """The learning rates to try, ascending: as many for every method."""
        base = self.fixed_rate if variant.lr is None and self.fixed_rate is not None else variant.base_rate
        return [float(f"{base * factor:.4g}") for factor in sorted(self.rates)]


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", label).strip("-.") or "-"
