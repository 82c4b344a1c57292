"""Tasks, one file each: model + loss + metrics + decoding for one kind of problem."""

from collections.abc import Mapping
from typing import Any

from deltalens.tasks.classification import ClassificationTask
from deltalens.tasks.detection import Detection, DetectionTask
from deltalens.tasks.gradients import backward, gradient_rule
from deltalens.tasks.instances import InstanceTask
from deltalens.tasks.multilabel import MultiLabelTask
from deltalens.tasks.oriented import OrientedTask
from deltalens.tasks.segmentation import SegmentationTask, Segmented
from deltalens.tasks.segmentation_inference import Inference

KINDS = (ClassificationTask, MultiLabelTask, SegmentationTask, DetectionTask, InstanceTask, OrientedTask)
TASKS = {task.name: task for task in KINDS}


def task_class(name: str | None) -> type:
    """The task of that name: `Splits.task`, and "task" in an adapter's info; classification where nothing is said."""
    name = name or ClassificationTask.name
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def main_metric_of(name: str | None, origin: Mapping[str, Any]) -> str:
    """What choices are made by for a task on data of this origin (`Splits.origin`), which may name its "metrics": those
    of VOC or of COCO."""
    kind = task_class(name)
    return getattr(kind, "main_metrics", {}).get(origin.get("metrics"), kind.main_metric)


__all__ = [
    "TASKS",
    "ClassificationTask",
    "Detection",
    "DetectionTask",
    "Inference",
    "InstanceTask",
    "MultiLabelTask",
    "OrientedTask",
    "SegmentationTask",
    "Segmented",
    "backward",
    "gradient_rule",
    "main_metric_of",
    "task_class",
]
