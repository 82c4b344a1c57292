"""Tasks, one file each: model + loss + metrics + decoding for one kind of problem."""

from deltalens.tasks.classification import ClassificationTask
from deltalens.tasks.gradients import backward, gradient_rule
from deltalens.tasks.multilabel import MultiLabelTask

TASKS = {task.name: task for task in (ClassificationTask, MultiLabelTask)}


def task_class(name: str | None) -> type[ClassificationTask]:
    """The task of that name: `Splits.task`, and "task" in an adapter's info; classification where nothing is said."""
    name = name or ClassificationTask.name
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "ClassificationTask", "MultiLabelTask", "backward", "gradient_rule", "task_class"]
