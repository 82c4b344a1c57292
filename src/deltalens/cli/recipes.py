"""`--recipe NAME`: YAML files of settings that come with the package."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path


def recipe_files() -> dict[str, Path]:
    """Name -> file of every recipe."""
    folder = Path(str(files("deltalens.studies") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary(path: Path) -> str:
    """The comment in a recipe's first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def translate(argv: list[str]) -> list[str]:
    """Put `--config FILE` in the place of `--recipe NAME`. UsageError with the nearest names for an unknown one."""
    from deltalens.cli.main import UsageError

    translated, words, known = [], iter(argv), recipe_files()
    for word in words:
        option, equals, name = word.partition("=")
        if option != "--recipe":
            translated.append(word)
            continue
        name = name if equals else next(words, "")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2) or list(known)
            raise UsageError(f"unknown recipe {name!r}; did you mean {' or '.join(near)}? (deltalens list recipes)")
        translated += ["--config", str(known[name])]
    return translated
