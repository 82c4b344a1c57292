"""Geomview's OFF: vertices and faces as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_off(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """(vertices (n, 3), vertex numbers of each face). Files without a line break after "OFF", as some of ModelNet have
    them, are read too. ValueError for what is no OFF, or ends too early."""
    with open(path, encoding="ascii", errors="replace") as stream:
        lines = [line for line in (line.partition("#")[0].strip() for line in stream) if line]
    kind = next((name for name in ("COFF", "OFF") if lines and lines[0].upper().startswith(name)), None)
    if kind is None:
        raise ValueError("it does not begin with OFF")
    rest = lines[0][len(kind) :].strip()
    lines = [rest, *lines[1:]] if rest else lines[1:]
    counts = lines[0].split() if lines else []
    if len(counts) < 2:
        raise ValueError("it does not say how many vertices and faces it has")
    vertices, faces = int(counts[0]), int(counts[1])
    if vertices < 0 or faces < 0 or len(lines) < 1 + vertices + faces:
        raise ValueError(f"it ends early: it announces {vertices} vertices and {faces} faces")
    points = np.array([line.split()[:3] for line in lines[1 : 1 + vertices]], dtype=np.float64).reshape(vertices, -1)
    return points, [_face(line) for line in lines[1 + vertices : 1 + vertices + faces]]


def _face(line: str) -> np.ndarray:
    numbers = line.split()
    corners = np.array(numbers[1 : 1 + int(numbers[0])], dtype=np.int64)
    if len(corners) != int(numbers[0]):
        raise ValueError(f"a face ends early: {line!r}")
    return corners
