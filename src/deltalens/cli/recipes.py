"""`--recipe NAME`: a YAML file that comes with the package, in the place of `--config FILE`."""

from __future__ import annotations

import difflib

from deltalens.studies.recipe_files import command_of, recipe_files, summary

COMMANDS = {
    "train": "for deltalens train --recipe NAME",
    "compare": "for deltalens compare NAME",
    "tune": "for deltalens tune --space NAME",
}


def listing(names: list[str]) -> list[str]:
    """Lines that show these recipes, those of each command together."""
    known, lines = recipe_files(), []
    for command, said in COMMANDS.items():
        members = [name for name in names if command_of(known[name]) == command]
        lines += [f"{said}:", *(f"  {name:<26} {summary(known[name])}" for name in members)] if members else []
    return lines


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
