"""Which of a run's metrics methods are compared by, and what tables call it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltalens.studies.dense_words import SAID

FIRST = ("accuracy", "mAP", "miou", "mask_map", "map")
TOP1 = "accuracy"


def metric_of(values: Mapping[str, Any], wanted: str | None = None) -> str | None:
    """The metric among these values that runs are compared by. wanted: what the run says it is, where it does; else
    accuracy, mAP of several labels, mIoU, mask AP and box AP, the first that is there."""
    return wanted if wanted in values else next((name for name in FIRST if name in values), None)


def score(values: Mapping[str, float], wanted: str | None = None) -> float | None:
    """Its value; None where there is none."""
    name = metric_of(values, wanted)
    return None if name is None else values[name]


def metric_words(metrics: Iterable[str | None]) -> str:
    """What a column of these metrics is called: "accuracy", "mAP", "mIoU", "box AP (COCO)"; several with "or"."""
    names = dict.fromkeys(SAID.get(name, name) for name in metrics if name is not None)
    return " or ".join(names) or TOP1
