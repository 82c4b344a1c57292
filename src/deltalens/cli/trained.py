"""Load a trained adapter for a command that uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_trained(directory: str, device: str | None) -> tuple[nn.Module, list[str], torch.device]:
    """(model in eval mode on the device, class names, device). Where the adapter names no classes they are "0", "1"...

    Raises as `deltalens.from_pretrained`; ValueError for a device that is not there.
    """
    import torch

    import deltalens as dl
    from deltalens.lifecycle.state import adapter_of

    model = dl.from_pretrained(directory)
    class_names = dl.class_names(model) or [str(i) for i in range(adapter_of(model)[1].num_classes or 0)]
    chosen = chosen_device(device)
    return model.to(chosen), class_names, torch.device(chosen)


def chosen_device(name: str | None) -> str:
    """The device of that name, or the fastest there is. ValueError for one that is not there."""
    import torch

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available.append("cuda")
    if name is None:
        return available[-1]
    if name.partition(":")[0] not in available:
        raise ValueError(f"there is no device {name!r} here; available: {', '.join(available)}")
    return name


def label_of(model: nn.Module, folder: str) -> str:
    """For figures: the last two names of the path as it was given, and the method."""
    from pathlib import Path

    from deltalens.lifecycle.state import adapter_of

    methods = " + ".join(method.name for method in adapter_of(model)[1].configs)
    return f"{'/'.join(Path(folder).parts[-2:])} ({methods})"
