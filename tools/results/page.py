"""docs/results.md: what stands between the markers of a table, and the plots beside the page."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.grid import Grid
from deltalens.studies.study_details import Details, read_details
from deltalens.studies.study_table import Cell, StudyTable, read_table

from .plots import draw
from .tables import ROOT, Table

END = "<!-- end -->"


@dataclass(frozen=True)
class Page:
    """file: the page, which holds the markers already. images: the folder of its plots, below the page's."""

    file: Path = ROOT / "docs/results.md"
    images: str = "images/results"

    def write(self, table: Table, grid: Grid) -> None:
        """Put the table, its plots, and how it was made between its markers. What stands around them is left alone.

        Raises ValueError where the page has no place for the table, or the study has no finished run.
        """
        text = self.file.read_text(encoding="utf-8")
        begin, end = self.place(text, table.name)
        found, details = read_table(grid), read_details(grid)
        if details.first is None:
            raise ValueError(f"the study of the table {table.name} has no finished run; the page is as it was")
        parts = [made_with(table, grid, details), incomplete(found), body(found), *self._plots(table, found, grid)]
        block = "\n\n".join(part for part in parts if part)
        write_text(self.file, f"{text[:begin]}\n{block}\n\n{text[end:]}")

    def place(self, text: str, name: str) -> tuple[int, int]:
        """Where the table begins, behind its marker, and where it ends, before the next one."""
        marker = f"<!-- table {name}: begin -->\n"
        begin = text.find(marker)
        if text.count(marker) != 1:
            raise ValueError(f"{self.file} needs one line {marker.strip()}")
        end = text.find(END, begin)
        if end < 0 or "<!-- table" in text[begin + len(marker) : end]:
            raise ValueError(f"{self.file} needs a line {END} behind {marker.strip()}")
        return begin + len(marker), end

    def _plots(self, table: Table, found: StudyTable, grid: Grid) -> list[str]:
        folder, lines = self.file.parent / self.images, []
        for kind, words in table.plots.items():
            drawn = {f"{table.name}-{kind}-{name}.svg": svg for name, svg in draw(kind, found, grid.study).items()}
            for file in folder.glob(f"{table.name}-{kind}-*.svg"):  # of earlier backbones and datasets
                if file.name not in drawn:
                    file.unlink()
            for name, svg in drawn.items():
                write_text(folder / name, svg)
                lines.append(f"![{words}]({self.images}/{name})")
        return lines


# ------------------------------------------------------------------ what is said
def made_with(table: Table, grid: Grid, details: Details) -> str:
    """The command, what it carries out, machine, dates, versions."""
    study = table.file.relative_to(ROOT).as_posix() if table.file.is_relative_to(ROOT) else table.file.name
    data, output = Path("DATA"), Path("RUNS", table.name)
    words = ["deltalens", *table.words(data, output)]
    command = " ".join(study if word == str(table.file) else word for word in words)
    facts = [_machine(grid), _dates(details), *details.versions[:1]]
    if len(details.versions) > 1:
        facts[-1] += " and others"
    return (
        f"Made with `python -m tools.results {table.name} --data DATA`, which carries out\n\n"
        f"```bash\n{command}\n```\n\n"
        f"{'; '.join(facts)}."
    )


def _machine(grid: Grid) -> str:
    """The machines that the results name, and how many name none."""
    named = Counter(results.get("machine") for run in grid.runs() if (results := run.results()))
    unnamed, total = named.get(None, 0), named.total()
    named.pop(None, None)
    machines = " and ".join(machine for machine, _ in named.most_common())
    if not unnamed:
        return machines
    return f"{machines + '; ' if machines else ''}machine not recorded in {unnamed} of {total} runs"


def _dates(details: Details) -> str:
    first, last = (date.fromisoformat(day) for day in (details.first, details.last))
    return _day(first) if first == last else f"{_day(first)} to {_day(last)}"


def _day(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def incomplete(found: StudyTable) -> str:
    """Which methods lack seeds; empty where every run is finished or has failed."""
    states = Counter(row.status for row in found.rows)
    if not states["open"]:
        return ""
    lacking: dict[str, list[str]] = {}
    tasks = {(cell.backbone, cell.dataset) for cell in found.cells}
    for cell in found.cells:
        if cell.left:
            name = cell.variant.label + (f" ({cell.backbone}, {cell.dataset})" if len(tasks) > 1 else "")
            lacking.setdefault(_seeds(cell), []).append(name)
    names = "; ".join(f"{seeds}: {', '.join(methods)}" for seeds, methods in lacking.items())
    return f"**Incomplete:** {states['finished']} of {len(found.rows)} runs are finished. {names}."


def _seeds(cell: Cell) -> str:
    finished = len(cell.accuracies)
    total = finished + cell.left + len(cell.failures_of_finals)
    return f"{finished} of {total} seed{'s' if total != 1 else ''}"


def body(found: StudyTable) -> str:
    """The study's own tables; with one task without a heading, and else with headings below the page's."""
    _, _, text = found.to_markdown().partition("\n\n")
    tasks = {(cell.backbone, cell.dataset) for cell in found.cells}
    text = re.sub(r"^## .*\n\n", "", text, flags=re.M) if len(tasks) == 1 else re.sub(r"^## ", "### ", text, flags=re.M)
    return re.sub(r"^\|.*$", lambda row: _narrow(row[0]), text.strip(), flags=re.M)


def _narrow(row: str) -> str:
    """A row of a Markdown table without the spaces that align it."""
    return re.sub(r"-{3,}", "---", re.sub(r" +", " ", row))
