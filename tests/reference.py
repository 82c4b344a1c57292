"""The fixtures made by the published implementations, where they lie beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
VECTORS = SHARED / "reference_vectors"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a fixture; skips the test where the fixtures are absent."""
    path = VECTORS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference vectors are not here: {name}.safetensors")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def load_json(name: str):
    path = VECTORS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the reference vectors are not here: {name}.json")
    return json.loads(path.read_text())


def sub(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
