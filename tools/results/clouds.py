"""The shapes of `tools.pretrain.points.voxels` as class folders of clouds, which `deltalens compare` reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from tools.pretrain.points.voxels import VoxelShapes, class_names

POINTS = 1024
SPLITS = ("train", "val", "test")


def write_clouds(shapes: Path, target: Path) -> Path:
    """`<target>/<split>/<class>/<number>.npy`, one drawn cloud (1024, 3) float32 of each shape; left alone where it is
    there already."""
    if target.is_dir():
        return target
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    names = class_names(shapes)
    for split in SPLITS:
        for name in names:
            (unfinished / split / name).mkdir(parents=True)
        part = VoxelShapes(shapes, split)
        for index, label in enumerate(part.labels.tolist()):
            file = unfinished / split / names[label] / f"{int(part.numbers[index]):04d}.npy"
            np.save(file, part.cloud(index, POINTS, seed=0), allow_pickle=False)
    os.replace(unfinished, target)
    return target
