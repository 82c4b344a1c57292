"""Where an object is, in the ways that annotations say it, as masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Outline = list[list[float]] | dict[str, Any] | np.ndarray | None


def filled(outlines: Sequence[Outline], height: int, width: int) -> np.ndarray:
    """Masks (n, height, width), uint8 of 0 and 1.

    An outline is COCO's list of polygons [x1, y1, x2, y2, ...] in pixels, filled together as COCO's own code does; its
    run-length code {"size": [height, width], "counts": ...}, where counts is a list or its compressed form; a
    mask (height, width); or None for an empty mask. Raises ValueError for code that cannot be read.
    """
    masks = np.zeros((len(outlines), height, width), np.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        if isinstance(outline, np.ndarray):
            mask[:] = outline != 0
        elif outline:
            mask[:] = _decoded(outline, height, width)
    return masks


def problem(outline: Outline, height: int, width: int) -> str | None:
    """What is wrong with an outline for a picture of this size, None where nothing is."""
    if outline is None:
        return None
    if isinstance(outline, np.ndarray):
        return None if outline.shape == (height, width) else f"a mask of {_by(*outline.shape[:2])}"
    if isinstance(outline, dict):
        return _problem_of_code(outline, height, width)
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon that is no list of three or more points x, y"
        if not np.isfinite(np.asarray(polygon, np.float64)).all():
            return "a polygon with a coordinate that is no number"
    return None


def _problem_of_code(code: dict[str, Any], height: int, width: int) -> str | None:
    size, counts = code.get("size"), code.get("counts")
    if not isinstance(counts, (list, str, bytes)) or not isinstance(size, (list, tuple)) or len(size) != 2:
        return "a segmentation without size and counts"
    if tuple(size) != (height, width):
        return f"a mask of {_by(*size)}"
    if isinstance(counts, list) and sum(counts) != height * width:
        return f"run lengths that sum to {sum(counts)}, not {height * width}"
    return None


def _by(height: int, width: int) -> str:
    return f"{width} x {height} pixels"


def _decoded(outline: Any, height: int, width: int) -> np.ndarray:
    codes = _library()
    if isinstance(outline, list):
        return codes.decode(codes.merge(codes.frPyObjects(outline, height, width)))
    counts = outline["counts"]
    if isinstance(counts, list):
        return codes.decode(codes.frPyObjects(outline, height, width))
    return codes.decode({"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts})


def _library() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError('masks of objects need faster-coco-eval: pip install "deltalens[dense]"') from error
    return mask
