"""Generated solids as point clouds: ten classes that need no download.

Every solid is a profile (radius, height) turned about the y axis in steps: with many steps it is round, with four a
cone becomes a pyramid and a cylinder a cube. Points are drawn on the surface by area. Then a cloud is stretched along
each axis, turned about the y axis, tilted, cut by a plane, and made noisy, so that no two are alike and some are hard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from deltalens.data.clouds import CloudArrays
from deltalens.data.meshes import sample_mesh

ROUND = 40  # steps of a turn that looks round
STRETCH, TILT, CUT, NOISE = (0.8, 1.25), 15.0, 0.2, 0.015  # factors, degrees, share of the points, standard deviation


def _arc(radius: float, start: float, stop: float, middle: float = 0.0, steps: int = 20) -> tuple:
    """(radius, height) along a circle, from one angle to another in degrees; 90 is the top."""
    angles = np.radians(np.linspace(start, stop, steps))
    return tuple((middle + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


SOLIDS = {
    "sphere": (_arc(1, 90, -90), ROUND),
    "dome": ((*_arc(1, 90, 0), (0.0, 0.0)), ROUND),
    "cone": (((0.0, 1.0), (1.0, -1.0), (0.0, -1.0)), ROUND),
    "double cone": (((0.0, 1.0), (1.0, 0.0), (0.0, -1.0)), ROUND),
    "cylinder": (((0.0, 1.0), (0.8, 1.0), (0.8, -1.0), (0.0, -1.0)), ROUND),
    "tube": (((0.8, 1.0), (0.8, -1.0)), ROUND),
    "torus": (_arc(0.35, 0, 360, 0.75), ROUND),
    "cube": (((0.0, 0.75), (1.05, 0.75), (1.05, -0.75), (0.0, -0.75)), 4),
    "pyramid": (((0.0, 1.0), (1.2, -0.8), (0.0, -0.8)), 4),
    "prism": (((0.0, 0.9), (1.0, 0.9), (1.0, -0.9), (0.0, -0.9)), 3),
}
CLASS_NAMES = tuple(SOLIDS)
VAL_CLOUDS, TEST_CLOUDS = 5, 20  # of each class


@dataclass(frozen=True)
class Solids:
    """The three parts, all different clouds, and the names of the classes in the order of the labels."""

    train: CloudArrays
    val: CloudArrays
    test: CloudArrays
    class_names: tuple[str, ...] = field(default=CLASS_NAMES)


def make_solids(train_clouds: int = 150, points: int = 1024, seed: int = 0) -> Solids:
    """`train_clouds` for training, as equal a number of every class as there are, 50 for validation, 200 for the
    test. points: of each cloud. The same numbers give the same clouds; val and test depend on `points` and seed alone.

    Raises ValueError for less than one training cloud of each class.
    """
    if train_clouds < len(CLASS_NAMES):
        raise ValueError(f"train_clouds must be at least {len(CLASS_NAMES)}, one of each class, got {train_clouds}")
    counts = (train_clouds, VAL_CLOUDS * len(CLASS_NAMES), TEST_CLOUDS * len(CLASS_NAMES))
    return Solids(*(_part(count, points, (seed, part)) for part, count in enumerate(counts)))


def solid_cloud(name: str, points: int, random: np.random.Generator) -> np.ndarray:
    """One cloud (points, 3), float32, of a class."""
    vertices, faces = _turned(*SOLIDS[name])
    many = math.ceil(points / (1 - CUT)) + 1
    cloud = sample_mesh(vertices, faces, many, int(random.integers(2**31))).astype(np.float64)
    cloud = cloud * random.uniform(*STRETCH, 3)
    cloud = _cut(cloud, random.uniform(0, CUT), random)
    cloud = cloud @ _turn(random.uniform(0, 360), 1) @ _turn(random.uniform(-TILT, TILT), 0)
    cloud = cloud[random.permutation(len(cloud))[:points]]
    return (cloud + random.normal(0, NOISE, cloud.shape)).astype(np.float32)


# ------------------------------------------------------------------ details
def _part(count: int, points: int, seed: tuple[int, int]) -> CloudArrays:
    labels = [number % len(CLASS_NAMES) for number in range(count)]
    clouds = [
        solid_cloud(CLASS_NAMES[label], points, np.random.default_rng((*seed, number)))
        for number, label in enumerate(labels)
    ]
    return CloudArrays(clouds, labels)


def _turned(profile: tuple[tuple[float, float], ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(vertices, triangles) of a profile turned about the y axis."""
    radius, height = np.array(profile).T
    angles = 2 * np.pi * np.arange(steps) / steps
    x, z = radius[:, None] * np.cos(angles), radius[:, None] * np.sin(angles)
    vertices = np.stack([x, np.broadcast_to(height[:, None], x.shape), z], 2).reshape(-1, 3)
    ring, step = np.meshgrid(np.arange(len(profile) - 1), np.arange(steps), indexing="ij")
    here, beside = ring * steps + step, ring * steps + (step + 1) % steps
    first = np.stack([here, beside, here + steps], -1).reshape(-1, 3)
    second = np.stack([beside, beside + steps, here + steps], -1).reshape(-1, 3)
    return vertices, np.concatenate([first, second])


def _cut(cloud: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Without the share of the points that lies farthest out in some direction."""
    direction = random.normal(size=3)
    order = np.argsort(cloud @ direction)
    return cloud[np.sort(order[: len(order) - int(share * len(order))])]


def _turn(degrees: float, axis: int) -> np.ndarray:
    """The matrix that turns rows about an axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = [other for other in range(3) if other != axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix
