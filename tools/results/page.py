"""docs/results.md: what stands between the markers of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from deltalens.lifecycle.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
END = "<!-- end -->"


@dataclass(frozen=True)
class Page:
    """file: the page, which holds the markers already. images: the folder of its pictures, below the page's."""

    file: Path = ROOT / "docs/results.md"
    images: str = "images/results"

    @property
    def pictures(self) -> Path:
        return self.file.parent / self.images

    def put(self, name: str, parts: Iterable[str]) -> None:
        """Write these parts between the markers of a table. What stands around them is left alone."""
        text = self.file.read_text(encoding="utf-8")
        begin, end = self.place(text, name)
        block = "\n\n".join(part for part in parts if part)
        write_text(self.file, f"{text[:begin]}\n{block}\n\n{text[end:]}")

    def place(self, text: str, name: str) -> tuple[int, int]:
        """Where the table begins, behind its marker, and where it ends, before the next one. ValueError where the page
        has no such place."""
        marker = f"<!-- table {name}: begin -->\n"
        begin = text.find(marker)
        if text.count(marker) != 1:
            raise ValueError(f"{self.file} needs one line {marker.strip()}")
        end = text.find(END, begin)
        if end < 0 or "<!-- table" in text[begin + len(marker) : end]:
            raise ValueError(f"{self.file} needs a line {END} behind {marker.strip()}")
        return begin + len(marker), end


def made_with(name: str, commands: Sequence[str], runs: Sequence[dict[str, Any]], days: tuple[str, str]) -> str:
    """How a table was made: its command and what that carries out; the machines and versions of the results that it is
    made of, and the first and the last day."""
    versions = Counter(", ".join(f"{n} {v}" for n, v in (each.get("versions") or {}).items()) for each in runs)
    ((version, _), *others) = versions.most_common()
    facts = [_machine(runs), _dates(*days), version + (" and others" if others else "")]
    carried_out = "\n".join(commands)
    return (
        f"Made with `python -m tools.results {name} --data DATA --runs RUNS`, which carries out\n\n"
        f"```bash\n{carried_out}\n```\n\n{'; '.join(facts)}."
    )


def _machine(runs: Sequence[dict[str, Any]]) -> str:
    """The machines that the results name, and how many name none."""
    named = Counter(each.get("machine") for each in runs)
    unnamed = named.pop(None, 0)
    machines = " and ".join(machine for machine, _ in named.most_common())
    if not unnamed:
        return machines
    return f"{machines + '; ' if machines else ''}machine not recorded in {unnamed} of {len(runs)} runs"


def _dates(first: str, last: str) -> str:
    return _day(first) if first == last else f"{_day(first)} to {_day(last)}"


def _day(text: str) -> str:
    day = date.fromisoformat(text)
    return f"{day.day} {day:%B %Y}"
