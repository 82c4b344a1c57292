"""Point clouds with labels, in files and in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deltalens.data.broken import without_broken_items
from deltalens.data.cloud_files import checked_cloud, read_cloud

LIMIT = 10**9  # bytes that are kept in memory at most


class Clouds(Dataset):
    """Clouds with labels. Items are (transform(cloud), label) with cloud a float32 tensor (n, 3)."""

    labels: list[Any]
    transform: Callable | None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        cloud = self.cloud(index)
        return (self.transform(cloud) if self.transform else cloud), self.labels[index]

    def cloud(self, index: int) -> Tensor:
        """One cloud (n, 3) as it is read, without the transform. ValueError names one that cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call one cloud."""
        raise NotImplementedError

    def __add__(self, other: Self) -> Self:  # type: ignore[override]
        """The items of both, with the transform of the first."""
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Self:
        """The items at these indices, as a dataset of their own."""
        raise NotImplementedError


class CloudFiles(Clouds):
    """One file for each cloud."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[Any], transform: Callable | None = None):
        self.paths, self.labels, self.transform = list(paths), list(labels), transform

    def __add__(self, other: CloudFiles) -> CloudFiles:
        return CloudFiles(self.paths + other.paths, [*self.labels, *other.labels], self.transform)

    def cloud(self, index: int) -> Tensor:
        return torch.from_numpy(read_cloud(self.paths[index]))

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def subset(self, indices: Sequence[int]) -> CloudFiles:
        return CloudFiles([self.paths[i] for i in indices], [self.labels[i] for i in indices], self.transform)


class CloudArrays(Clouds):
    """Arrays (n, 3 or more columns) in memory, one for each cloud. names: what messages call them."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray | Tensor],
        labels: Sequence[Any],
        transform: Callable | None = None,
        names: Sequence[str] | None = None,
    ):
        if len(arrays) != len(labels):
            raise ValueError(f"{len(arrays)} clouds but {len(labels)} labels")
        self.arrays, self.labels, self.transform = list(arrays), list(labels), transform
        self.names = [f"cloud {number}" for number in range(len(labels))] if names is None else list(names)

    def __add__(self, other: CloudArrays) -> CloudArrays:
        labels, names = [*self.labels, *other.labels], self.names + other.names
        return CloudArrays(self.arrays + other.arrays, labels, self.transform, names)

    def cloud(self, index: int) -> Tensor:
        try:
            return torch.from_numpy(checked_cloud(np.asarray(self.arrays[index])))
        except ValueError as error:
            raise ValueError(f"cannot read the cloud {self.names[index]}: {error}") from error

    def name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: Sequence[int]) -> CloudArrays:
        chosen = list(indices)
        return CloudArrays(
            [self.arrays[i] for i in chosen],
            [self.labels[i] for i in chosen],
            self.transform,
            [self.names[i] for i in chosen],
        )


def without_broken_clouds(clouds: Clouds, skip_broken: bool) -> Clouds:
    """Read every cloud once; broken ones raise ValueError with their names, or are left out and printed."""
    with ThreadPoolExecutor(4) as pool:
        problems = list(pool.map(lambda index: _problem(clouds, index), range(len(clouds))))
    return without_broken_items(clouds, problems, "clouds", skip_broken)


def _problem(clouds: Clouds, index: int) -> str | None:
    try:
        clouds.cloud(index)
    except (ValueError, OSError) as error:
        return " ".join(str(error).removeprefix("cannot read the cloud ").split())
    return None


def keep_clouds(clouds: Clouds, resample: Callable[[Tensor], Tensor], limit: int = LIMIT) -> Clouds | None:
    """Read and resample every cloud now, where all of them take at most `limit` bytes, None otherwise. The transform
    is that of `clouds`."""
    kept: list[Tensor] = []
    size = 0
    for index in range(len(clouds)):
        kept.append(resample(clouds.cloud(index)).contiguous())
        size += kept[-1].numel() * kept[-1].element_size()
        if size > limit or size * len(clouds) > 4 * limit * len(kept):  # the second finds big clouds at once
            return None
    return CloudArrays(kept, clouds.labels, clouds.transform, [clouds.name(i) for i in range(len(clouds))])
