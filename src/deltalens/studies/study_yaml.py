"""YAML with line numbers, so that an error can say where it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]  # ("methods", "Mona", "bottleneck"): keys and list positions from the top


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class Document:
    """A YAML file: its content, and the line of every entry.

    Raises FileNotFoundError, and ValueError with file and line for what is no YAML, or a key that stands twice.
    """

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.lines: dict[Place, tuple[Path, int]] = {}  # where each entry stands
        try:
            node = yaml.compose(text, _Loader)
            if node is not None:
                self._walk(node, ())
            self.content: Any = yaml.load(text, _Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{path}{line}: this is no valid YAML: {error.problem or error.context}") from error

    def _walk(self, node: yaml.Node, place: Place) -> None:
        self.lines.setdefault(place, (self.path, node.start_mark.line + 1))
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self._walk(child, (*place, index))
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                name = str(key.value)
                here = (*place, name)
                if name in seen:
                    self.lines[here] = (self.path, key.start_mark.line + 1)
                    raise self.error(here, f"{name!r} stands here a second time; every name may be used once")
                seen.add(name)
                self.lines[here] = (self.path, key.start_mark.line + 1)
                self._walk(child, here)

    # ------------------------------------------------------------------ errors, and what is checked everywhere
    def error(self, place: Place, message: str) -> ValueError:
        """An error at an entry: "study.yaml, line 7, methods.Mona: message". An entry that is not there is placed where
        it should be."""
        path, line = self._where(place)
        at = f", line {line}" if line else ""
        field = f", {'.'.join(map(str, place))}" if place else ""
        return ValueError(f"{path}{at}{field}: {message}")

    def file_of(self, place: Place) -> Path:
        """The file in which an entry stands."""
        return self._where(place)[0]

    def _where(self, place: Place) -> tuple[Path, int | None]:
        known = place
        while known not in self.lines and known:
            known = known[:-1]
        return self.lines.get(known, (self.path, None))

    def mapping(self, value: Any, place: Place, allowed: Iterable[str] | None = None) -> dict[str, Any]:
        """The value as a mapping with text keys, all of them allowed."""
        if not isinstance(value, dict):
            expected = f" with {', '.join(allowed)}" if allowed is not None else ""
            raise self.error(place, f"expected a mapping (name: value){expected}, got {value!r}")
        found = {str(key): each for key, each in value.items()}
        if allowed is not None:
            names = list(allowed)
            for key in found:
                if key not in names:
                    near = difflib.get_close_matches(key, names, n=1)
                    hint = f"did you mean {near[0]}? " if near else ""
                    raise self.error((*place, key), f"there is no such field; {hint}allowed: {', '.join(names)}")
        return found

    def number(self, value: Any, place: Place, *, whole: bool = False, above: float | None = None) -> Any:
        """The value as a number; whole: an integer; above: it must be larger than this."""
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or (above is not None and not value > above):
            wanted = ("a whole number" if whole else "a number") + (f" above {above:g}" if above is not None else "")
            raise self.error(place, f"expected {wanted}, got {value!r}")
        return value

    def text(self, value: Any, place: Place) -> str:
        """The value as text."""
        if not isinstance(value, str) or not value:
            raise self.error(place, f"expected text, got {value!r}")
        return value

    def flag(self, value: Any, place: Place) -> bool:
        if not isinstance(value, bool):
            raise self.error(place, f"expected true or false, got {value!r}")
        return value
