"""`deltalens/points-mini`: a small `PointTransformer` whose weights come with the package. See `weights/README.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "deltalens/points-mini"
WEIGHTS = Path(__file__).parents[1] / "weights" / "points-mini.safetensors"
NUM_POINTS = 1024
ENCODER: dict[str, Any] = {
    "dim": 128,
    "depth": 6,
    "heads": 4,
    "num_groups": 32,
    "group_size": 32,
    "encoder_dim": 128,
    "encoder_hidden": (64, 128),
}
CONFIG: dict[str, Any] = {**ENCODER, "head": "linear", "drop_path": 0.0, "num_points": NUM_POINTS}
