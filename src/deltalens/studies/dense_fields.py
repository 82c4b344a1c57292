"""What a study file says of dense tasks: the task, the head on every backbone, pictures, loss and inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from deltalens.backbones.dense.named import HEADS
from deltalens.data.dense_formats import DENSE_TASKS
from deltalens.data.dense_transforms import DenseAugmentation
from deltalens.studies.study_yaml import Document, Place

TOP = ("task", "head", "head_options")
AUGMENTATION = tuple(each.name for each in fields(DenseAugmentation))
FIELDS = (*AUGMENTATION, "test_size", "auxiliary_weight", "window", "stride")
"""Of `training: dense:`. test_size: [short, long] of evaluation pictures; window, stride: of `Inference`."""


def read_dense(document: Document, top: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(the task, options that every backbone is built with) of a study's top fields; (None, {}) where there are none.

    ValueError with line and field for an unknown task or head, and where one of the two is missing.
    """
    task, head, settings = (top.get(name) for name in TOP)
    if task is None and head is None and settings is None:
        return None, {}
    if task not in DENSE_TASKS:
        raise document.error(("task",), f"a study with a head needs a task, {', '.join(DENSE_TASKS)}; got {task!r}")
    if head not in HEADS:
        raise document.error(("head",), f"{task} needs a head, one of {', '.join(HEADS)}; got {head!r}")
    return task, {"head": head, "head_options": document.mapping(settings or {}, ("head_options",))}


def dense_training(document: Document, value: Any, place: Place) -> dict[str, Any]:
    """`training: dense:`, checked as far as `DenseAugmentation` does; lists become tuples."""
    found = document.mapping(value or {}, place, FIELDS)
    said: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in found.items()}
    try:
        DenseAugmentation(**{name: each for name, each in said.items() if name in AUGMENTATION})
    except (TypeError, ValueError) as error:
        named = next((name for name in said if name in str(error)), None)
        raise document.error((*place, *([named] if named else [])), str(error)) from error
    return said
