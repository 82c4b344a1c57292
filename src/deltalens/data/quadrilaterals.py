"""Areas of quadrilaterals, and of what a window leaves of them. All vectorised, in float64."""

from __future__ import annotations

import numpy as np

Window = tuple[float, float, float, float]  # left, top, right, bottom


def in_order(corners: np.ndarray) -> np.ndarray:
    """Corners (n, 4, 2) in the order of their directions from the mean, so that no two sides cross."""
    corners = np.asarray(corners, np.float64).reshape(-1, 4, 2)
    away = corners - corners.mean(1, keepdims=True)
    order = np.argsort(np.arctan2(away[..., 1], away[..., 0]), 1, kind="stable")
    return np.take_along_axis(corners, order[..., None], 1)


def areas_of(corners: np.ndarray) -> np.ndarray:
    """(n,) areas of quadrilaterals (n, 4, 2) with corners in any order."""
    return np.abs(_signed(in_order(corners)))


def areas_inside(corners: np.ndarray, window: Window) -> np.ndarray:
    """(n,) areas of the parts of quadrilaterals (n, 4, 2) that lie in a window.

    Where the outline of a polygon crosses the edges of the window it gets a point, and what lies outside is then moved
    onto the edge: the area of the moved outline is that of the part inside, as what runs along an edge encloses nothing
    more.
    """
    points = in_order(corners)
    for axis in (0, 1):
        low, high = window[axis], window[axis + 2]
        points = _with_crossings(points, axis, low, high)
        points[..., axis] = np.clip(points[..., axis], low, high)
    return np.abs(_signed(points))


def shares_inside(corners: np.ndarray, window: Window) -> np.ndarray:
    """(n,) of the areas of quadrilaterals (n, 4, 2), the shares in a window; 0 of those without area."""
    whole = areas_of(corners)
    return np.divide(areas_inside(corners, window), whole, out=np.zeros_like(whole), where=whole > 0)


def _with_crossings(points: np.ndarray, axis: int, low: float, high: float) -> np.ndarray:
    """(n, 3 k, 2): every side of polygons (n, k, 2) as three points, where it crosses the two lines or begins."""
    starts, sides = points, np.roll(points, -1, 1) - points
    along = sides[..., axis]
    safe = np.where(along == 0, 1.0, along)
    at = [np.where(along == 0, 0.0, (line - starts[..., axis]) / safe) for line in (low, high)]
    places = np.sort(np.clip(np.stack([np.zeros_like(along), *at], -1), 0, 1), -1)
    split = starts[..., None, :] + places[..., None] * sides[..., None, :]
    return split.reshape(len(points), 3 * points.shape[1], 2)


def _signed(points: np.ndarray) -> np.ndarray:
    """The shoelace formula about the first point, for polygons (n, k, 2)."""
    away = points - points[:, :1]
    after = np.roll(away, -1, 1)
    return (away[..., 0] * after[..., 1] - away[..., 1] * after[..., 0]).sum(1) / 2
