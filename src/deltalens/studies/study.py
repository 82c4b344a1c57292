"""What a study file says: which methods, backbones, datasets and seeds are compared, and how they are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from deltalens.data.inputs import Augmentation
from deltalens.data.subsets import TrainingSubset
from deltalens.methods import FullConfig, Method
from deltalens.studies.candidates import Candidate, SearchPlan, Values, draw_candidates
from deltalens.studies.published import Published
from deltalens.studies.search_space import METHOD, RATES, rate_of, with_values
from deltalens.training.optim import default_learning_rate
from deltalens.training.settings import TrainingSettings

Protocol = Literal["fair", "published"]


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
    shots: int | None = None
    origin: str | None = None

    @property
    def source(self) -> str:
        """The name of the dataset as a whole: what parts of one dataset share."""
        return self.origin or self.name


@dataclass(frozen=True)
class Variant:
    """A row of the table: one method, or several that make one adapter.

    x, curve: where this row lies in the plot of curves. lr: in the place of the method's own default rate; or base_lr,
    for 256 images a step. training: in the place of fields of the study's training. own_search: search, which may be
    None, stands in the place of the study's. backbone: more options for the backbone's constructor. tower: the only one
    that is adapted, of a model with several. datasets: the row
    as it is on single datasets, where it differs.
    """

    label: str
    methods: tuple[Method, ...]
    x: float | None = None
    curve: str | None = None
    lr: float | None = None
    base_lr: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    own_search: bool = False
    search: SearchPlan | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    tower: str | None = None
    datasets: Mapping[str, Variant] = field(default_factory=dict)

    def on(self, dataset: str) -> Variant:
        """The row as it is on that dataset."""
        return self.datasets.get(dataset, self)

    @property
    def own_fields(self) -> list[str]:
        """The fields in which this row is not treated as the others are."""
        said = {
            "lr": self.lr is not None,
            "base_lr": self.base_lr is not None,
            "training": bool(self.training),
            "search": self.own_search,
            "backbone": bool(self.backbone),
            "datasets": bool(self.datasets),
        }
        return [name for name, own in said.items() if own]

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
    train`. dense: of dense tasks, fields of `DenseAugmentation`, and test_size, auxiliary_weight, window, stride."""

    epochs: int = 20
    batch_size: int = 64
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    schedule: str = "step"
    warmup_lr: float | None = None
    optimizer: str = "adamw"
    eps: float = 1e-8
    clip_grad: float = 0.0
    precision: str = "32"
    min_lr: float = 0.0
    decay: str = "cosine"
    decay_at: tuple[float, ...] = ()
    no_decay: tuple[str, ...] | None = None
    label_smoothing: float = 0.0
    min_crop: float = 0.5
    hflip: float = 0.5
    rand_augment: int = 0
    cloud_augment: str = "scale+shift"
    dense: Mapping[str, Any] = field(default_factory=dict)

    @property
    def augmentation(self) -> Augmentation:
        """Of training inputs; of dense tasks by what `dense` says."""
        return Augmentation.among({**vars(self), **self.dense})

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

    search: what is chosen on the validation images, for all methods that have no search of their own. lr or base_lr
    (for 256 images a step): of all methods that name none, in the place of their defaults. protocol: "fair" where all
    methods are treated alike, "published" where each has its paper's settings. reference: the row that the report's
    test compares the others with; without one full fine-tuning, else the first row. scatter: the datasets on the axes
    of the report's plot of two tasks; without them the first two. published: numbers of papers, to be shown beside.
    base_to_novel: train on the first half of the classes, and test on the second half, too. targets: further datasets
    that every trained model is tested on, with their classes. left_out: datasets of the file that no folder was given
    for. task: the dense task, whose head stands among the backbones' options; None for labels.
    """

    title: str
    backbones: tuple[BackboneEntry, ...]
    datasets: tuple[DatasetEntry, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    training: Training = field(default_factory=Training)
    split: Split = field(default_factory=Split)
    search: SearchPlan | None = None
    lr: float | None = None
    base_lr: float | None = None
    protocol: Protocol | None = None
    keep_adapters: bool = True
    x_title: str = "x"
    reference: str | None = None
    scatter: tuple[str, str] | None = None
    published: tuple[Published, ...] = ()
    base_to_novel: bool = False
    targets: tuple[DatasetEntry, ...] = ()
    left_out: tuple[str, ...] = ()
    task: str | None = None

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

    # ------------------------------------------------------------------ one row
    def search_of(self, variant: Variant) -> SearchPlan | None:
        return variant.search if variant.own_search else self.search

    def training_of(
        self, variant: Variant, dataset: DatasetEntry | None = None, values: Values | None = None
    ) -> Training:
        """The study's training with what the dataset, the row, and a candidate of a search say otherwise, the last one
        first."""
        own = {name: getattr(dataset, name, None) for name in ("min_crop", "hflip")}
        chosen = {name: each for name, each in (values or {}).items() if name not in RATES and METHOD not in name}
        said = {name: each for name, each in own.items() if each is not None}
        return replace(self.training, **(said | dict(variant.training) | chosen))

    def methods_of(self, variant: Variant, values: Values) -> list[Method]:
        """The methods of a row with the values of a candidate."""
        return with_values(variant.methods, values)

    def rate_of(self, variant: Variant, batch_size: int) -> float:
        """The rate that holds where a search chooses none, and that relative rates multiply."""
        for entry in (variant, self):
            if entry.lr is not None:
                return entry.lr
            if entry.base_lr is not None:
                return rate_of(entry.base_lr, batch_size)
        return default_learning_rate(variant.methods)

    def candidates(self, variant: Variant) -> list[Candidate]:
        """What is tried for a row, ascending by learning rate; one where nothing is searched."""
        batch_size, plan = self.training_of(variant).batch_size, self.search_of(variant)

        def rate(batch_size: int) -> float:
            return self.rate_of(variant, batch_size)

        if plan is None:
            return [Candidate({"lr": rate(batch_size)})]
        return draw_candidates(plan, variant.methods, rate, batch_size, self.split.seed)


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", label).strip("-.") or "-"
