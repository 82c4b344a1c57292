"""YAML files that come with the package: settings of `deltalens train --recipe NAME`, studies of `deltalens compare
NAME`, search spaces of `deltalens tune --space NAME`."""

from __future__ import annotations

import difflib
from pathlib import Path

from deltalens.studies.recipe_files import recipe_files

__all__ = ["recipe_files", "summary", "translate"]


def summary(path: Path) -> str:
    """The comment in a recipe's first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def translate(argv: list[str]) -> list[str]:
    """Put `--config FILE` in the place of `--recipe NAME`. UsageError with the nearest names for an unknown one."""
    from deltalens.cli.main import UsageError

    translated, words, known = [], iter(argv), recipe_files("train")
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
