"""Shapes on a grid of 30 x 30 x 30 voxels as point clouds: the surface voxels of each, and seeded draws from them.

A file `modelnet10_30.npz` holds bits of occupied voxels (`train_bits`, `test_bits`), labels, and the indices of the
shapes to be used in `train_index`, `val_index` (both into the training shapes) and `test_index`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

FILE, SIDE = "modelnet10_30.npz", 30
CHUNK = 256  # shapes unpacked at once
NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))


def class_names(root: Path) -> list[str]:
    """In label order."""
    return list(json.loads((root / "info.json").read_text())["classes"])


def surfaces(occupied: np.ndarray) -> list[np.ndarray]:
    """Grids (n, s, s, s) of bool -> for each its surface voxels (m, 3): occupied, with an empty neighbour on a side.
    What lies outside the grid is empty."""
    padded = np.pad(occupied, ((0, 0), (1, 1), (1, 1), (1, 1)))
    inside = np.ones_like(occupied)
    for shift in NEIGHBOURS:
        window = tuple(slice(1 + step, occupied.shape[1] + 1 + step) for step in shift)
        inside &= padded[(slice(None), *window)]
    return [np.argwhere(shape) for shape in occupied & ~inside]


class VoxelShapes:
    """The shapes of a split. `clouds(indices, n, seed)` draws a cloud of each."""

    def __init__(self, root: Path, split: str):
        with np.load(root / FILE) as file:
            part = "test" if split == "test" else "train"
            self.numbers = file[f"{split}_index"]
            self.labels = torch.from_numpy(file[f"{part}_label"].astype(np.int64)[self.numbers])
            bits = file[f"{part}_bits"][self.numbers]
        self.of_test = split == "test"
        self.surfaces = []
        for start in range(0, len(bits), CHUNK):
            grids = np.unpackbits(bits[start : start + CHUNK], axis=1, count=SIDE**3).astype(bool)
            self.surfaces += surfaces(grids.reshape(-1, SIDE, SIDE, SIDE))

    def __len__(self) -> int:
        return len(self.surfaces)

    def cloud(self, index: int, points: int, seed: int) -> np.ndarray:
        """(points, 3) float32 in the unit ball around the origin. Each surface voxel is drawn as often as the others,
        give or take one, and each point lies anywhere in its voxel; (seed, shape) always gives the same cloud."""
        voxels = self.surfaces[index]
        draw = np.random.default_rng([seed, int(self.numbers[index]), self.of_test])
        order = draw.permutation(len(voxels))
        chosen = np.concatenate([order] * (-(-points // len(voxels))))[:points]
        cloud = voxels[chosen] + draw.random((points, 3)) - 0.5
        cloud = cloud - cloud.mean(0)
        return (cloud / np.linalg.norm(cloud, axis=1).max()).astype(np.float32)

    def clouds(self, indices: torch.Tensor, points: int, seed: int) -> torch.Tensor:
        """(B, points, 3) float32."""
        return torch.from_numpy(np.stack([self.cloud(int(index), points, seed) for index in indices]))
