"""Points on the surface of a mesh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POINTS = 10_000  # of a file with a mesh, as many as ModelNet40's resampled files have


def sample_mesh(vertices: np.ndarray, faces: Sequence[np.ndarray], count: int = POINTS, seed: int = 0) -> np.ndarray:
    """`count` points on the triangles of a mesh, uniform by area, float32 (count, 3).

    vertices: (n, 3). faces: vertex numbers of polygons, which are cut into the triangles around their first corner.
    A triangle is drawn with probability area / whole area, a point in it as

        (1 - sqrt(r)) a + sqrt(r) (1 - s) b + sqrt(r) s c,     r, s uniform in [0, 1).

    The same mesh and seed give the same points. Raises ValueError for faces that name no vertex, or without area.
    """
    triangles = _triangles(faces)
    if not len(triangles):
        raise ValueError("its faces have less than three corners")
    if triangles.min() < 0 or triangles.max() >= len(vertices):
        raise ValueError(f"a face names a vertex that is not there; there are {len(vertices)}")
    corners = vertices.astype(np.float64)[triangles]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if not areas.sum() > 0:
        raise ValueError("its faces have no area")
    random = np.random.default_rng(seed)
    a, b, c = corners[random.choice(len(areas), count, p=areas / areas.sum())].transpose(1, 0, 2)
    root, along = np.sqrt(random.random((count, 1))), random.random((count, 1))
    return ((1 - root) * a + root * (1 - along) * b + root * along * c).astype(np.float32)


def _triangles(faces: Sequence[np.ndarray]) -> np.ndarray:
    """(m, 3) vertex numbers."""
    if isinstance(faces, np.ndarray):  # all of one size
        return np.concatenate([faces[:, [0, i, i + 1]] for i in range(1, faces.shape[1] - 1)])
    found = []
    for size in sorted({len(face) for face in faces}):
        if size >= 3:
            polygons = np.stack([face for face in faces if len(face) == size]).astype(np.int64)
            found += [polygons[:, [0, i, i + 1]] for i in range(1, size - 1)]
    return np.concatenate(found) if found else np.empty((0, 3), np.int64)
