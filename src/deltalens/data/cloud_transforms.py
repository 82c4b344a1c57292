"""From clouds as they are read to a model's input, for training and for the test.

`preprocessing` is the dictionary of `deltalens.preprocessing(model)` of a model that takes points: num_points, and
normalize, "unit_sphere" or None. Transforms take a float32 tensor (n, 3) and give one (num_points, 3). All that is
random comes from torch's generator, which the loaders seed for each item.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALE, SHIFT = (2 / 3, 3 / 2), 0.2
AUGMENTATIONS = ("scale", "shift", "rotate")
NONE, DEFAULT = "none", "scale+shift"
WHOLE = 8192  # inputs of so many points and more have no larger pool


def farthest_points(cloud: Tensor, count: int) -> Tensor:
    """Numbers (count,) of points (n, 3), each the farthest from all before it, beginning with the first (Eldar et al.
    1997). The first k of a larger count are those of k.

    As `deltalens.models.point_ops.farthest_points(..., skip_origin=False)`, in half the time for one cloud on a CPU,
    and no point is taken twice. The official loaders pass points near the origin over, as CUDA's kernel of PointNet++
    does; here they may be chosen. Raises ValueError for more points than there are.
    """
    points = np.ascontiguousarray(cloud.numpy(), dtype=np.float32)
    if not 1 <= count <= len(points):
        raise ValueError(f"count must be 1 to {len(points)}, the number of points, got {count}")
    x, y, z = np.ascontiguousarray(points.T)
    chosen = np.zeros(count, dtype=np.int64)
    nearest = np.full(len(points), np.inf, dtype=np.float32)
    nearest[0] = -1.0
    for k in range(1, count):
        last = points[chosen[k - 1]]
        np.minimum(nearest, (x - last[0]) ** 2 + (y - last[1]) ** 2 + (z - last[2]) ** 2, out=nearest)
        chosen[k] = nearest.argmax()
        nearest[chosen[k]] = -1.0  # also where points coincide
    return torch.from_numpy(chosen)


def unit_sphere(cloud: Tensor) -> Tensor:
    """(cloud - mean) / largest distance from the mean; a cloud in one place stays there, at the origin."""
    centred = cloud - cloud.mean(0)
    return centred / centred.norm(dim=1).max().clamp_min(1e-12)


def pool_size(num_points: int) -> int:
    """How many farthest points training draws its input from: 1200 for 1024, 2400 for 2048, as published."""
    return num_points if num_points >= WHOLE else math.ceil(num_points * 1200 / 1024)


class Resample:
    """Normalise a cloud, and take its `count` farthest points where it has more."""

    def __init__(self, count: int, normalize: str | None):
        if normalize not in (None, "unit_sphere"):
            raise ValueError(f"normalize is unit_sphere or None, got {normalize!r}")
        self.count, self.normalize = count, normalize

    def __call__(self, cloud: Tensor) -> Tensor:
        if self.normalize is not None:
            cloud = unit_sphere(cloud)
        return cloud if len(cloud) <= self.count else cloud[farthest_points(cloud, self.count)]


class TakePoints:
    """`count` points: the first ones, or, shuffled, any; all of them more than once where there are too few."""

    def __init__(self, count: int, shuffle: bool):
        self.count, self.shuffle = count, shuffle

    def __call__(self, cloud: Tensor) -> Tensor:
        order = torch.randperm(len(cloud)) if self.shuffle else torch.arange(len(cloud))
        return cloud[order.repeat(-(-self.count // len(cloud)))[: self.count]]


class RandomScaleShift:
    """Multiply each axis with a factor from U(2/3, 3/2), and add to it a number from U(-0.2, 0.2), where asked."""

    def __init__(self, scale: bool, shift: bool):
        self.scale, self.shift = scale, shift

    def __call__(self, cloud: Tensor) -> Tensor:
        if self.scale:
            cloud = cloud * torch.empty(3).uniform_(*SCALE)
        return cloud + torch.empty(3).uniform_(-SHIFT, SHIFT) if self.shift else cloud


class RandomRotation:
    """Turn about the y axis, which points up, by an angle from U(0, 2 pi)."""

    def __call__(self, cloud: Tensor) -> Tensor:
        angle = float(torch.rand(())) * 2 * math.pi
        c, s = math.cos(angle), math.sin(angle)
        return cloud @ cloud.new_tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])


class Steps:
    """One transform after the other."""

    def __init__(self, *steps: Callable[[Tensor], Tensor]):
        self.steps = steps

    def __call__(self, cloud: Tensor) -> Tensor:
        for step in self.steps:
            cloud = step(cloud)
        return cloud


def augmentation_words(augment: str) -> tuple[str, ...]:
    """What "scale+shift" is made of; nothing for "none". ValueError for other words."""
    words = tuple(word.strip() for word in augment.split("+")) if augment != NONE else ()
    wrong = [word for word in words if word not in AUGMENTATIONS]
    if wrong:
        raise ValueError(
            f"unknown augmentation of clouds {wrong[0]!r}; there are {NONE}, or {', '.join(AUGMENTATIONS)} joined by +"
        )
    return words


def cloud_steps(preprocessing: dict[str, Any], augment: str = NONE) -> tuple[Resample, Steps]:
    """(what is done once to a cloud, what is done at each reading).

    Without augmentation the `num_points` farthest points are taken, as for the test, and nothing is random. With it,
    `num_points` of a larger pool of farthest points are drawn at each reading, scaled, shifted and turned as `augment`
    says: "scale+shift" in Point-MAE and DAPT, "rotate" in IDPT and ReCon on ScanObjectNN.
    """
    count, normalize = preprocessing["num_points"], preprocessing.get("normalize")
    words = augmentation_words(augment)
    if not words:
        return Resample(count, normalize), Steps(TakePoints(count, False))
    turn = [RandomRotation()] if "rotate" in words else []
    moved = RandomScaleShift("scale" in words, "shift" in words)
    return Resample(pool_size(count), normalize), Steps(TakePoints(count, True), *turn, moved)
