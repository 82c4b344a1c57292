"""A trained run on data that it was not trained on: the novel half of the classes, other datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.data.splits import Splits
from deltalens.tasks import ClassificationTask


def tested_elsewhere(
    task: ClassificationTask,
    others: Mapping[str, Splits],
    test: Callable[[ClassificationTask, Splits], dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """Name -> {"accuracy", "mean_class_accuracy"..., "images", "classes"} of a trained task on each of `others`, where
    the classifier gets their class names; {"refused": why} for a model or a method that is bound to its own classes.

    test: (task, data) -> its metrics on data.test. The model has its own classes again at the end.
    """
    model = task.model
    if not isinstance(model, ZeroShotClassifier):
        return {name: {"refused": "its head is for the classes of the training"} for name in others}
    own, found = model.class_names, {}
    try:
        for name, data in others.items():
            try:
                model.set_classes(data.class_names)
                measured = test(ClassificationTask(model, data.class_names), data)
            except ValueError as error:  # what a method says that belongs to its classes
                found[name] = {"refused": str(error)}
                continue
            size = {"images": len(data.test), "classes": len(data.class_names)}  # type: ignore[arg-type]
            found[name] = {metric: value for metric, value in measured.items() if metric != "loss"} | size
    finally:
        model.set_classes(own)
    return found
