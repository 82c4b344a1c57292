"""A dense task on a network that is there, with what its adapter's info says of metrics and of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from deltalens.tasks import Inference, SegmentationTask, task_class


def make_task(network: nn.Module, class_names: list[str], task: str, info: dict[str, Any], **said: Any) -> nn.Module:
    """The task of that name on an adapted network. info: the adapter's, which says what metrics the data have and how
    whole images are segmented."""
    kind: Callable[..., nn.Module] = task_class(task)
    if kind is SegmentationTask:
        inference = said.pop("inference", None) or Inference(**info.get("inference", {}))
        return kind(network, class_names, inference=inference, **said)
    return kind(network, class_names, metrics=(info.get("split") or {}).get("metrics"))
