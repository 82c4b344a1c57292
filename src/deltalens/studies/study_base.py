"""A study file that builds on another: `base: FILE`, and what is different."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from deltalens.studies.recipe_files import recipe_files
from deltalens.studies.study_yaml import Document, Place

BASE = "base"


def read_with_base(path: Path) -> Document:
    """The document of a file, on top of what its field `base` names: a file, relative to this one, or a study of the
    package, or a list of these, of which each is on top of the one before.

    Mappings are merged field by field; a list, number or text takes the place of the base's; null takes a field away.
    Errors name the file in which an entry stands. ValueError for a base that is not there, or builds on this file.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> Document:
    document = Document(path)
    content = document.content
    if not isinstance(content, dict) or BASE not in content:
        return document
    chain, several = (*above, path.resolve()), isinstance(content[BASE], list)
    below: Any = {}
    lines: dict[Place, tuple[Path, int]] = {}
    for index, name in enumerate(content[BASE] if several else [content[BASE]]):
        place: Place = (BASE, index) if several else (BASE,)
        found = _base_file(document, document.text(name, place), place)
        if found.resolve() in chain:
            raise document.error(place, f"{found} builds on this file itself")
        base = _read(found, chain)
        below, lines = merged(below, base.content), lines | base.lines
    own = {key: value for key, value in content.items() if key != BASE}
    document.content, document.lines = merged(below, own), lines | document.lines
    return document


def _base_file(document: Document, name: str, place: Place) -> Path:
    beside = document.path.parent / name
    if beside.is_file():
        return beside
    known = recipe_files("compare")
    if name in known:
        return known[name]
    near = ", ".join(difflib.get_close_matches(name, known, n=2) or known)
    raise document.error(place, f"there is no file {beside}, nor a study {name!r} in the package; it has {near}")


def merged(base: Any, own: Any) -> Any:
    """own on top of base: mappings field by field, null takes a field away."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    result = dict(base)
    for key, value in own.items():
        if value is None and key in result:
            del result[key]
        else:
            result[key] = merged(base.get(key), value)
    return result
