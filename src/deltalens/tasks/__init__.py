"""Tasks, one file each: model + loss + metrics + decoding for one kind of problem."""

from deltalens.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
