"""The runs of a study and its cells: what was measured, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltalens.studies.candidates import Values, value_text, values_text
from deltalens.studies.study import Variant


@dataclass(frozen=True)
class RunRow:
    """One run, a line of runs.csv. Accuracies are fractions (metric says of what: "accuracy", or "mAP" where images
    have several labels); settings: "lr 0.003, weight_decay 0.01", what was searched; transfer: name -> what was
    measured elsewhere (`deltalens.studies.transfer`); what is not known is None."""

    stage: str
    backbone: str
    dataset: str
    method: str
    seed: int
    lr: float | None
    status: str
    val_accuracy: float | None
    test_accuracy: float | None
    test_mean_class_accuracy: float | None
    adapter_parameters: int | None
    head_parameters: int | None
    backbone_parameters: int | None
    percent: float | None
    training_seconds: float | None
    total_seconds: float | None
    x: float | None
    curve: str | None
    folder: str
    message: str | None
    metric: str | None = None
    peak_memory_bytes: int | None = None
    settings: str | None = None
    training_images: int | None = None
    adapter_bytes: int | None = None
    backbone_bytes: int | None = None
    model_bytes: int | None = None
    transfer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """What methods are compared by: on the test images, on those for validation where there is no test."""
        return self.val_accuracy if self.test_accuracy is None else self.test_accuracy


@dataclass(frozen=True)
class Cell:
    """One method on one backbone and dataset: its final runs together.

    accuracies: on the test images (validation where there is no test), of the finished runs, in the order of the
    seeds. chosen: values by name, what the search varies, else the rate; edges: the names at an edge of the search.
    failures: messages, of the searches too. left: final runs that are neither finished nor failed. tested: accuracies
    are on test images. memory: most GPU memory of training in bytes, the mean over runs; None where runs were not on a
    GPU. training_images: that a run was trained on. adapter_bytes: on disk with the head, the mean over runs;
    backbone_bytes, model_bytes: of the plain backbone without and with the head; None where the results do not say.
    transfer: name of other data -> accuracies there; refused: name -> why there are none.
    """

    backbone: str
    dataset: str
    variant: Variant
    accuracies: tuple[float, ...]
    adapter_parameters: int | None
    head_parameters: int | None
    percent: float | None
    chosen: Values
    edges: frozenset[str]
    seconds: float | None
    failures: tuple[str, ...]
    left: int
    backbone_parameters: int | None = None
    metric: str | None = None
    tested: bool = True
    memory: float | None = None
    training_images: int | None = None
    adapter_bytes: float | None = None
    backbone_bytes: int | None = None
    model_bytes: int | None = None
    transfer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def lr(self) -> float | None:
        """The chosen rate; None where there is no result, or where it was not searched."""
        return self.chosen.get("lr")

    @property
    def at_edge(self) -> bool:
        return bool(self.edges)

    def settings_text(self) -> str:
        """ "0.003 *" where only the rate is of interest, else "lr 0.003 *, weight_decay 0.01"."""
        if list(self.chosen) == ["lr"]:
            return value_text(self.lr) + (" *" if self.at_edge else "")
        return values_text(self.chosen, self.edges)

    @property
    def with_head(self) -> int | None:
        """Trained parameters, head included."""
        return None if self.adapter_parameters is None else self.adapter_parameters + self.head_parameters

    @property
    def complete(self) -> bool:
        """Whether every final run has finished."""
        return self.mean is not None and not self.left and not self.failures_of_finals

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def accuracy_text(self) -> str:
        """ "91.2 ± 0.4", with what is missing said; "failed" or "-" where there is nothing."""
        if self.mean is None:
            return "failed" if self.failures and not self.left else "-"
        text = f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if self.std is not None else "")
        failed = len(self.failures_of_finals)
        notes = ([f"{failed} failed"] if failed else []) + ([f"{self.left} to come"] if self.left else [])
        return text + (f" ({', '.join(notes)})" if notes else "")

    @property
    def failures_of_finals(self) -> list[str]:
        return [message for message in self.failures if message.startswith("seed ")]
