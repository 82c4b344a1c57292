"""The YAML files that come with the package, by name and by the command they are for."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path


def recipe_files(command: str | None = None) -> dict[str, Path]:
    """Name -> file of every recipe; command: only those of "train", "compare" or "tune"."""
    folder = Path(str(files("deltalens.studies") / "recipes"))
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {name: path for name, path in found.items() if command in (None, command_of(path))}


def command_of(path: Path) -> str:
    """The command a recipe is for: studies are those that list backbones, searches those that have a space."""
    text = path.read_text(encoding="utf-8")
    if re.search(r"^space:", text, re.M):
        return "tune"
    return "compare" if re.search(r"^backbones:", text, re.M) else "train"
