"""Data loaders whose order and augmentation depend on (seed, epoch, sample) alone.

Nothing random is carried from one step to the next, so that a resumed run, another number of workers, or a look at the
validation set in between change nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

LISTED = 4  # items of several sizes that are evaluated together: their logits or masks lie in memory whole


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several non-negative integers."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class EpochSampler(Sampler):
    """(epoch, index) keys in an order drawn from (seed, epoch), this process's share of them.

    `set_epoch` is called by Lightning, and by hand in other loops. start: (epoch, items) at which a resumed run
    begins; that many items of that epoch are passed over. With several processes every one gets the same number of
    items.
    """

    def __init__(
        self, length: int, seed: int, batch_size: int, start: tuple[int, int] = (0, 0), rank: int = 0, world: int = 1
    ):
        self.length, self.seed, self.batch_size, self.start = length, seed, batch_size, start
        self.rank, self.world = rank, world
        self.epoch = start[0]

    def __len__(self) -> int:
        """Whole batches only, unless the data does not fill one."""
        share = self.length // self.world
        return share - share % self.batch_size if share >= self.batch_size else share

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        mine = order[self.rank :: self.world][: len(self)]
        skipped = self.start[1] if epoch == self.start[0] else 0
        yield from ((epoch, index) for index in mine[skipped:])


class SeededItems(Dataset):
    """A dataset read by (epoch, index) keys: torch's random numbers inside an item depend on (seed, epoch, index)
    only."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            return self.dataset[index]


def collate_of(dataset: Dataset) -> Callable[[list], Any] | None:
    """How items of a dataset become a batch: its own `collate` (items of different sizes as lists), that of what it is
    a part or the first piece of, None for torch's way."""
    own = getattr(dataset, "collate", None)
    if own is not None:
        return own
    if isinstance(dataset, ConcatDataset):
        return collate_of(dataset.datasets[0])
    return collate_of(dataset.dataset) if isinstance(dataset, Subset | SeededItems) else None


def training_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    workers: int = 0,
    start: tuple[int, int] = (0, 0),
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Shuffled batches of `batch_size` a process; an incomplete last batch is left out, unless it is the only one.

    start: (epoch, batches) to begin at. Raises ValueError where a process would get nothing.
    """
    if len(dataset) < world:
        raise ValueError(f"{len(dataset)} training items cannot be shared by {world} processes")
    sampler = EpochSampler(len(dataset), seed, batch_size, (start[0], start[1] * batch_size), rank, world)
    return _loader(SeededItems(dataset, seed), batch_size, sampler, workers)


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    """Every item once, in order; with several processes each reads its own share, without padding. Items that come as
    lists, being of several sizes, come `LISTED` at a time at most."""
    indices = range(rank, len(dataset), world)
    at_once = batch_size if collate_of(dataset) is None else min(batch_size, LISTED)
    return _loader(dataset, at_once, list(indices), workers)


class Passes(Sampler):
    """(pass, index) keys in order, every index once a pass; passes are counted from 0."""

    def __init__(self, length: int):
        self.length, self.passes = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.passes += 1
        return iter([(self.passes - 1, index) for index in range(self.length)])


def preparation_loader(dataset: Dataset, batch_size: int, seed: int, workers: int = 0) -> DataLoader:
    """Every training item once, in order; the first pass as the first epoch would augment it, the second as the second.
    The same in every process. Images of several sizes come as `Images`."""
    loader = _loader(SeededItems(dataset, seed), batch_size, Passes(len(dataset)), workers)
    loader.collate_fn = functools.partial(_movable, loader.collate_fn)
    return loader


class Images(list):
    """Images of several sizes that move to a device together, as one tensor would."""

    def to(self, *args: Any, **kwargs: Any) -> Images:
        return Images(image.to(*args, **kwargs) for image in self)


def _movable(collate: Callable[[list], Any], items: list) -> tuple:
    images, *rest = collate(items)
    return Images(images) if isinstance(images, list) else images, *rest


def _loader(dataset: Dataset, batch_size: int, sampler: Sampler | list[int], workers: int) -> DataLoader:
    collate = collate_of(dataset)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, **_worker_options(workers))


def cores_at_hand() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(cores: int | None = None) -> int:
    """Loader processes: one less than the cores, at most 8; none on one or two cores. cores: None for those at
    hand."""
    cores = cores_at_hand() if cores is None else cores
    return 0 if cores <= 2 else min(8, cores - 1)


def _worker_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator().manual_seed(0),  # workers take their base seed from it, not from the global one
    }
