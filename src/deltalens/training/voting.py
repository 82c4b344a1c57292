"""One honest vote: the mean of a model's answers to several random views of each cloud.

    logits = 1/N sum_v model(view_v(cloud)),        v = 1 ... N

A view is what training sees: a random subset of a pool of farthest points, scaled and shifted. The official scripts of
Point-MAE and those after it repeat such a vote 299 times on the test set and report the best, which measures the
luckiest noise. Here the vote is taken once, with the seed that is named, and it stands whatever it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deltalens.tasks import ClassificationTask
from deltalens.training.loaders import preparation_loader


def voted(
    task: ClassificationTask,
    views: Dataset,
    votes: int,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
    device: Any = "cpu",
) -> Iterator[tuple[dict[str, Any], tuple[Tensor, Tensor]]]:
    """(result, batch) for each batch of the data in order: "output" is the mean of the logits of `votes` views, "loss"
    that of the mean. The batch is that of the last view.

    views: items are random by torch's generator, which is seeded by (seed, vote, item). Raises ValueError for less
    than one vote.
    """
    if votes < 1:
        raise ValueError(f"votes must be at least 1, got {votes}")
    loader = preparation_loader(views, batch_size, seed, workers)
    sums: list[Tensor] = []
    for vote in range(votes):
        for number, (clouds, labels) in enumerate(loader):
            batch = (clouds.to(device), labels.to(device))
            logits = task(batch)["output"]
            if vote == 0:
                sums.append(torch.zeros_like(logits))
            sums[number] = sums[number] + logits
            if vote == votes - 1:
                mean = sums[number] / votes
                yield {"output": mean, "loss": sum(task.own_losses(mean, batch[1]).values())}, batch
