"""Small clouds in folders, a tiny point transformer by name, and the shared ModelNet10, for tests of clouds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import SHARED

from deltalens.backbones.names import SOURCE_KEY, Source
from deltalens.data.clouds import CloudArrays
from deltalens.models.point_transformer import PointTransformer

TINY = "points/tiny"
VOXELS = SHARED / "data" / "points" / "modelnet10_voxels"
STRETCHES = {"flat": (1, 0.1, 1), "long": (1, 0.15, 0.15), "round": (1, 1, 1)}


def ball(random: np.random.Generator, kind: str, points: int = 80) -> np.ndarray:
    """A stretched shell (points, 3), float32, somewhere off the origin."""
    cloud = random.normal(size=(points, 3))
    cloud = cloud / np.linalg.norm(cloud, axis=1, keepdims=True) * STRETCHES[kind]
    return (cloud + random.normal(0, 0.02, cloud.shape) + 3).astype(np.float32)


def write_clouds(folder: Path, count: int, seed: int = 0, points: int = 80) -> Path:
    """`count` clouds of each class as .npy, in class folders."""
    random = np.random.default_rng(seed)
    for kind in STRETCHES:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            np.save(folder / kind / f"{i:03d}.npy", ball(random, kind, points))
    return folder


def write_cloud_splits(folder: Path, train: int = 8, val: int = 4, test: int = 4) -> Path:
    for seed, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        write_clouds(folder / split, count, seed)
    return folder


def tiny_points(num_classes: int | None = None, num_points: int = 64) -> PointTransformer:
    """The same weights every time; batch norms know the clouds' statistics, as in a pretrained model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PointTransformer(
            num_classes or 0,
            dim=24,
            depth=2,
            heads=2,
            num_groups=12,
            group_size=8,
            encoder_dim=24,
            head="linear",
            num_points=num_points,
        )
        _measure_batch_norms(model)
    model.eval().__dict__[SOURCE_KEY] = Source(TINY).to_dict()
    return model


def _measure_batch_norms(model: PointTransformer) -> None:
    random = np.random.default_rng(0)
    clouds = np.stack([ball(random, kind, 64) - 3 for kind in STRETCHES for _ in range(4)])
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches, and there is one
    with torch.no_grad():
        model.train()(torch.from_numpy(clouds))
    for norm in norms:
        norm.momentum = 0.1


def use_tiny_points(patch: pytest.MonkeyPatch) -> None:
    """Let the name points/tiny build that model, wherever backbones are built by name."""
    import deltalens
    import deltalens.lifecycle.base_model as base_model
    from deltalens.backbones.names import create_backbone

    def create(name, *, num_classes=None, pretrained=True, checkpoint=None, **kwargs):
        if name == TINY:
            return tiny_points(num_classes, **kwargs)
        return create_backbone(name, num_classes=num_classes, pretrained=pretrained, checkpoint=checkpoint, **kwargs)

    patch.setattr(deltalens, "create_backbone", create, raising=False)
    patch.setattr(base_model, "create_backbone", create)


def modelnet10(split: str, count: int | None = None, points: int = 1024) -> tuple[CloudArrays, list[str]]:
    """(clouds, class names) of a part of the shared ModelNet10, from surface voxels, y upwards; "train", "val" or
    "test". count: only so many, evenly spaced. Skips the test where the data is not here."""
    if not VOXELS.is_dir():
        pytest.skip("the shared ModelNet10 voxels are not here")
    arrays = np.load(VOXELS / "modelnet10_30.npz")
    part = "test" if split == "test" else "train"
    index, edge = arrays[f"{split}_index"], 30
    index = index if count is None else index[np.linspace(0, len(index) - 1, count).astype(int)]
    grids = np.unpackbits(arrays[f"{part}_bits"][index], axis=1, count=edge**3).reshape(-1, edge, edge, edge)
    clouds = [_surface(grid, points, np.random.default_rng(int(i))) for grid, i in zip(grids, index, strict=True)]
    return CloudArrays(clouds, arrays[f"{part}_label"][index].tolist()), _names()


def _surface(grid: np.ndarray, points: int, random: np.random.Generator) -> np.ndarray:
    """Points in occupied voxels with an empty neighbour."""
    padded = np.pad(grid, 1).astype(bool)
    inner = padded.copy()
    for axis in range(3):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    voxels = np.argwhere(padded & ~inner)
    chosen = voxels[random.permutation(np.resize(np.arange(len(voxels)), max(points, len(voxels))))[:points]]
    x, y, z = (chosen + random.random((points, 3))).astype(np.float32).T
    return np.stack([x, z, -y], 1)


def _names() -> list[str]:
    return json.loads((VOXELS / "info.json").read_text())["classes"]
