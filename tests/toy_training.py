"""A three-colour problem that a tiny network learns in seconds."""

from __future__ import annotations

import numpy as np
import torch
from models import tiny_vit
from torch import nn

import deltalens as dl
from deltalens.data import ArrayDataset, Splits
from deltalens.tasks import ClassificationTask

NAMES = ["a", "b", "c"]
QUIET = {"progress": False, "batch_size": 8, "lr": 1e-2}


def coloured(count: int, seed: int) -> ArrayDataset:
    """Pictures whose brightest channel is their class, with a random brightness at each reading."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, 32, 32, 3))
    images[np.arange(count), :, :, labels] += 100
    return ArrayDataset(images, labels, lambda image: image.float() / 255 - 0.5 + 0.1 * torch.rand(()))


def splits() -> Splits:
    return Splits(coloured(40, 0), coloured(12, 1), NAMES, coloured(9, 2))


def adapted_task(config=None, **kwargs) -> ClassificationTask:
    model = tiny_vit(num_classes=3, **kwargs)
    torch.manual_seed(3)
    return ClassificationTask(dl.attach(model, config or dl.MonaConfig(bottleneck=4)), NAMES)


def trained_tensors(task: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


class Interrupted(Exception):
    """Stands for a kill."""


def interrupt_at(task: nn.Module, forward: int) -> None:
    """Let the task's training forward number `forward` raise."""
    seen = []

    def count(module, inputs):
        seen.extend([1] if module.training else [])
        if len(seen) == forward:
            raise Interrupted

    task.register_forward_pre_hook(count)
