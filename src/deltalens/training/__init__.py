"""The training runner: optimiser groups, schedule, exact resume, Lightning underneath."""

from deltalens.training.runner import TrainingSettings, fit

__all__ = ["TrainingSettings", "fit"]
