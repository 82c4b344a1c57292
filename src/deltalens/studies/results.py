"""What a comparison of methods found: plain values that the report, the terminal table and JSON are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

ACCURACY = "accuracy"


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: mean training loss, and accuracy (0 to 1) on the validation images after it."""

    train_loss: float
    val_accuracy: float


@dataclass(frozen=True)
class Prediction:
    """What a model says about one picture: the most probable class and its probability."""

    name: str
    confidence: float


@dataclass(frozen=True)
class Picture:
    """One test image, uint8 (H, W) or (H, W, 3), with its true class."""

    image: np.ndarray
    true_name: str


@dataclass(frozen=True)
class RunResult:
    """One method, trained once.

    method: the name that tables and plots show. settings: what distinguishes the run (rank, learning rate...), in
    reading order. adapter_parameters, head_parameters: trained ones. accuracy: 0 to 1, on the test images.
    accuracy_std: over seeds, where there were several. seconds: of training. saved_bytes: what autograd keeps for the
    backward of one training step. adapter_bytes: the adapter's tensors on disk. folder: where the adapter lies,
    relative to the report. predictions: one for every picture of the comparison, in its order.
    """

    method: str
    settings: Mapping[str, Any]
    adapter_parameters: int
    head_parameters: int
    backbone_parameters: int
    accuracy: float
    seconds: float
    saved_bytes: int
    adapter_bytes: int
    epochs: list[Epoch] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    accuracy_std: float | None = None
    folder: str | None = None

    @property
    def trained_parameters(self) -> int:
        """Adapter and head."""
        return self.adapter_parameters + self.head_parameters

    @property
    def percent(self) -> float:
        """100 * adapter / backbone, without the head."""
        return 100 * self.adapter_parameters / self.backbone_parameters


@dataclass(frozen=True)
class Comparison:
    """Everything a report says.

    title, intro: text; the intro's paragraphs are separated by blank lines. pictures: test images that every run has
    predicted. pictures_note: how they were chosen. conditions: what was run, name -> value (command, data, versions,
    machine, date). test_images: how many the accuracies are measured on. inputs: what they are, "images", "clouds" or
    "scenes". metric: what `accuracy` is in all runs, as people call it, such as "mIoU".

    Raises ValueError where a run has another number of predictions than there are pictures, or two runs share a name.
    """

    title: str
    intro: str
    runs: list[RunResult]
    test_images: int
    pictures: list[Picture] = field(default_factory=list)
    pictures_note: str = ""
    conditions: Mapping[str, str] = field(default_factory=dict)
    inputs: str = "images"
    metric: str = ACCURACY

    def __post_init__(self) -> None:
        names = [run.method for run in self.runs]
        if len(set(names)) != len(names):
            raise ValueError(f"every run of a comparison needs its own name, got {', '.join(names)}")
        for run in self.runs:
            if len(run.predictions) != len(self.pictures):
                raise ValueError(
                    f"{run.method} has {len(run.predictions)} predictions, but there are {len(self.pictures)} pictures"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the pixels; the metric under its own name."""
        return {
            "title": self.title,
            "test_images": self.test_images,
            "inputs": self.inputs,
            "metric": self.metric,
            "runs": [self._named(asdict(run)) | {"percent": run.percent} for run in self.runs],
            "pictures": [picture.true_name for picture in self.pictures],
            "conditions": dict(self.conditions),
        }

    def _named(self, run: dict[str, Any]) -> dict[str, Any]:
        """A run's values with "accuracy" renamed to what it is."""
        if self.metric == ACCURACY:
            return run
        renamed = {name.replace(ACCURACY, self.metric): value for name, value in run.items()}
        epochs = [{name.replace(ACCURACY, self.metric): value for name, value in row.items()} for row in run["epochs"]]
        return renamed | {"epochs": epochs}


# ------------------------------------------------------------------ numbers as people read them
def percent_text(value: float) -> str:
    """A percentage with as many digits as it deserves: 0, 0.02, 1.36, 41, 100."""
    if value == 0:
        return "0"
    if value < 10:
        return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
    return f"{value:.1f}" if value < 100 and round(value, 1) != 100 else "100"


def bytes_text(count: float) -> str:
    """Decimal units: 8.2 kB, 1.4 MB, 12 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.3g} {unit}"


def seconds_text(seconds: float) -> str:
    """8.4 s, 84 s, 12 min 5 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 599.5:
        return f"{seconds:.0f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def count_text(count: float) -> str:
    """950, 1 k, 37 k, 2.7 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def settings_text(settings: Mapping[str, Any]) -> str:
    """{"r": 8, "lr": 0.002} -> "r 8, lr 0.002"."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
