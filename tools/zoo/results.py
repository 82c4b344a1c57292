"""Results as JSON lines: one object for a model, the last one counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def latest(path: Path) -> dict[str, dict[str, Any]]:
    """Key of a model -> its last result."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, filter(None, lines))}
