"""The YAML files that come with the package: settings of `deltalens train`, studies of `deltalens compare`, search
spaces of `deltalens tune`."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path


def recipe_files(command: str | None = None) -> dict[str, Path]:
    """Name -> file of every recipe; command: only those of "train", "compare" or "tune".

    A recipe in a folder is called folder/name. Files whose name begins with _ are parts of others, and no recipes.
    """
    folder = Path(str(files("deltalens.studies") / "recipes"))
    paths = (path for path in folder.rglob("*.yaml") if not path.name.startswith("_"))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    return {name: found[name] for name in sorted(found) if command in (None, command_of(found[name]))}


def command_of(path: Path) -> str:
    """The command a recipe is for: studies list backbones or build on another study, searches have a space."""
    text = path.read_text(encoding="utf-8")
    if re.search(r"^space:", text, re.M):
        return "tune"
    return "compare" if re.search(r"^(backbones|base):", text, re.M) else "train"


def summary(path: Path) -> str:
    """The comment in a recipe's first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
