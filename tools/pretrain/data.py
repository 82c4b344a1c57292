"""The packed 48 px image set as one uint8 array per split."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CACHE = Path("local/pretrain/cache")


def class_names(root: Path) -> list[str]:
    """The first name of each class, in label order."""
    classes = json.loads((root / "meta.json").read_text())["classes"]
    return [entry["words"].split(",")[0] for entry in classes]


def load_split(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N,) of a split; decoded once, then read from the cache."""
    index = np.load(root / f"{split}.npz")
    cached = CACHE / f"{root.name}-{split}.npy"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".partial.npy")
        np.save(partial, _decode(root, split, index))
        partial.replace(cached)
    images = torch.from_numpy(np.load(cached))
    return images, torch.from_numpy(index["label"].astype(np.int64))


def _decode(root: Path, split: str, index: np.lib.npyio.NpzFile) -> np.ndarray:
    shard, offset, length = (index[key].astype(np.int64) for key in ("shard", "offset", "length"))
    shards = [(root / f"{split}-{number:02d}.bin").read_bytes() for number in range(int(shard.max()) + 1)]
    size = json.loads((root / "meta.json").read_text())["size"]
    images = np.empty((len(shard), 3, size, size), np.uint8)
    for i, (s, o, n) in enumerate(zip(shard, offset, length, strict=True)):
        images[i] = np.asarray(Image.open(io.BytesIO(shards[s][o : o + n])).convert("RGB")).transpose(2, 0, 1)
    return images


class ShuffledBatches:
    """Endless batches of indices; epoch e is always the same permutation, so any step can be resumed."""

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size

    def starting_at(self, step: int) -> Iterator[torch.Tensor]:
        while True:
            epoch, batch = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            order = torch.randperm(self.num_images, generator=generator)
            for start in range(batch, self.steps_per_epoch):
                yield order[start * self.batch_size : (start + 1) * self.batch_size]
                step += 1
