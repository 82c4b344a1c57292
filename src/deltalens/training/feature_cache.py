"""Features of a frozen network, computed once and read from disk in every epoch.

Where nothing is trained below the head, or below block k, the network up to there gives the same features for an image
in every epoch and every run. `cached_features` computes them once, keeps them in files that later runs with the same
backbone, images and transforms find again, and lets a task train from them: the same function, in a fraction of the
time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from deltalens.data.splits import Splits
from deltalens.lifecycle.atomic import atomic_path, remove_leftovers
from deltalens.training.frozen_prefix import FeaturesCannotBeKept, find_cut, recorded, replayed
from deltalens.training.loaders import collate_of
from deltalens.training.settings import PRECISIONS, TrainingSettings


class KeptFeatures(Dataset):
    """Features of a dataset's inputs, read from a file: items are (features, *what came with the input)."""

    def __init__(self, file: Path, rest: list[tuple]):
        self.file, self.rest = file, rest
        self._features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self._features is None:  # each loader process opens the file itself
            self._features = np.load(self.file, mmap_mode="r")
        return torch.from_numpy(np.array(self._features[index])), *self.rest[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_features": None}


@contextlib.contextmanager
def cached_features(
    task: nn.Module, data: Splits, settings: TrainingSettings, folder: str | os.PathLike
) -> Iterator[tuple[Splits, dict[str, Any]]]:
    """(the same data as features, facts about them). While the context lasts the task takes batches of features.

    task: its forward takes (images, ...), and `task.model` has an adapter. folder: files of features are kept here,
    in the network's precision, one per part of the data; those of an earlier run are used where backbone,
    inputs and precision are the same. Every image is read twice, with different random states: where
    the two differ, there is augmentation, and features cannot be kept. The batches that features are computed in are
    not those of an uncached run, so that values agree to rounding.

    Raises FeaturesCannotBeKept, which says why (see `find_cut`).
    """
    from lightning.fabric import Fabric

    if settings.compile or settings.devices != 1:
        raise FeaturesCannotBeKept("features can be kept on one device and without torch.compile only")
    if collate_of(data.train) is not None:
        raise FeaturesCannotBeKept(
            "features cannot be kept of images of several sizes, as detection and masks have them"
        )
    fabric = Fabric(accelerator=settings.accelerator, devices=1, precision=PRECISIONS[settings.precision])
    started, model = time.perf_counter(), task.model
    if settings.precision == "64":
        model.double()
    model.to(fabric.device)
    dtype = next(model.parameters()).dtype
    examples = default_collate([data.train[index][0] for index in range(min(2, len(data.train)))])
    with fabric.autocast():
        cut = find_cut(model, examples.to(fabric.device, dtype))
    remove_leftovers(folder)
    writer = _Writer(fabric, model, cut, settings, Path(folder))
    parts = {name: part for name in ("train", "val", "test") if (part := getattr(data, name)) is not None}
    kept = {name: writer.features_of(part, name) for name, part in parts.items()}
    facts = {
        "cut": cut,
        "seconds": time.perf_counter() - started,
        "bytes": sum(each.file.stat().st_size for each in kept.values()),
        "computed": writer.computed,
    }
    model.cpu()
    with replayed(model, cut, tuple(examples.shape[1:])) as images_for:
        handle = task.register_forward_pre_hook(lambda module, args: ((images_for(args[0][0]), *args[0][1:]),))
        try:
            yield replace(data, **kept), facts
        finally:
            handle.remove()


class _Writer:
    """Computes features and keeps them in files named by everything that decides them."""

    def __init__(self, fabric, model: nn.Module, cut: str, settings: TrainingSettings, folder: Path):
        self.fabric, self.model, self.cut, self.settings, self.folder = fabric, model, cut, settings, folder
        self.dtype = next(model.parameters()).dtype
        self.computed: list[str] = []
        self._network = _digest_of_network(model, cut, settings.precision)

    def features_of(self, dataset: Dataset, name: str) -> KeptFeatures:
        inputs = hashlib.sha256(self._network)
        rest = []
        for images, others in self._batches(dataset, name):
            inputs.update(str((images.dtype, tuple(images.shape))).encode())
            inputs.update(images.numpy().tobytes())
            rest += others
        file = self.folder / f"{name}-{inputs.hexdigest()[:24]}.npy"
        if not file.is_file():
            self._write(file, dataset, name, len(rest))
            self.computed.append(name)
        return KeptFeatures(file, rest)

    def _batches(self, dataset: Dataset, name: str) -> Iterator[tuple[Tensor, list[tuple]]]:
        """(inputs, what comes with each) of every item in order, read twice in training data to find augmentation."""
        readings = [self._loader(dataset, seed) for seed in ((1, 2) if name == "train" else (1,))]
        for batches in zip(*readings, strict=True):
            if len(batches) == 2 and not torch.equal(batches[0][0], batches[1][0]):
                raise FeaturesCannotBeKept(
                    "features cannot be kept: the training data is augmented at random. Train without augmentation "
                    "(--min-crop 1 --hflip 0 --rand-augment 0, of clouds --cloud-augment none)"
                )
            yield batches[0]

    def _loader(self, dataset: Dataset, seed: int) -> DataLoader:
        return DataLoader(
            _ReadWithSeed(dataset, seed),
            self.settings.batch_size,
            num_workers=self.settings.workers,
            collate_fn=_collate,
        )

    @torch.no_grad()
    def _write(self, file: Path, dataset: Dataset, name: str, count: int) -> None:
        self.model.eval()
        features, done = None, 0
        with atomic_path(file) as temporary, recorded(self.model, self.cut) as kept:
            for images, _ in self._loader(dataset, 1):
                with self.fabric.autocast():
                    self.model(images.to(self.fabric.device, self.dtype))
                batch = kept.pop().to("cpu", self.dtype).numpy()
                if features is None:
                    shape = (count, *batch.shape[1:])
                    features = np.lib.format.open_memmap(temporary, mode="w+", dtype=batch.dtype, shape=shape)
                features[done : done + len(batch)] = batch
                done += len(batch)
            features.flush()


class _ReadWithSeed(Dataset):
    """Items of a dataset, each read with a random state of its own that depends on `seed`."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed + 2 * index)
            return self.dataset[index]


def _collate(items: list[tuple]) -> tuple[Tensor, list[tuple]]:
    return torch.stack([item[0] for item in items]), [tuple(item[1:]) for item in items]


def _digest_of_network(model: nn.Module, cut: str, precision: str) -> bytes:
    """A digest of all that is not trained, of where the network is cut, and of how it computes."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, cut, precision]).encode())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path, module in model.named_modules():
        if not f"{path}.".startswith(f"{cut}.") and not any(True for _ in module.children()):
            digest.update(f"{path} {module}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in trained and not name.startswith(f"{cut}."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
