"""Tables that a study makes: `deltalens compare`, its table, and its plots."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltalens.cli.main import main as deltalens
from deltalens.lifecycle.atomic import write_text
from deltalens.studies.cells import Cell
from deltalens.studies.grid import Grid
from deltalens.studies.significance import tasks_of
from deltalens.studies.study_details import read_details
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_table import StudyTable, read_table

from .page import ROOT, Page, made_with
from .plots import draw

STUDIES = ROOT / "benchmarks/studies"


@dataclass(frozen=True)
class Table:
    """data: name of a dataset in the study -> its folder below --data. time: of one CPU core. plots: kind of plot (see
    `plots.py`) -> words for those who do not see it. kept_features: whether the study may keep features, in a folder
    beside its runs. study: its file; by default the one of that name in benchmarks/studies. prepare: makes of a folder
    of `data` the one that the study reads, in a folder of that name beside its runs (`clouds.py`)."""

    name: str
    data: Mapping[str, str]
    time: str
    plots: Mapping[str, str]
    kept_features: bool = False
    study: Path | None = None
    prepare: Callable[[Path, Path], Path] | None = None

    @property
    def file(self) -> Path:
        return self.study or STUDIES / f"{self.name}.yaml"

    @property
    def needs(self) -> list[str]:
        """Folders below --data."""
        return list(self.data.values())

    def make(self, data: Path, runs: Path, page: Page, only_page: bool = False) -> None:
        """Carry out what is left of the study, and put its table, its plots and how it was made on the page.

        Raises RuntimeError where the study could not be carried out, ValueError where it has no finished run.
        """
        output = runs / self.name
        if self.prepare is not None and not only_page:
            for name, folder in self.data.items():
                self.prepare(data / folder, runs / name)
        if not only_page and deltalens(self.words(data, output)):
            raise RuntimeError(f"the study of the table {self.name} was not carried out; the page is as it was")
        grid = self.grid(data, output)
        found, details = read_table(grid), read_details(grid)
        results = [results for run in grid.runs() if (results := run.results())]
        if not results:
            raise ValueError(f"the study of the table {self.name} has no finished run; the page is as it was")
        made = made_with(self.name, [self._command()], results, (details.first, details.last))
        page.put(self.name, [made, incomplete(found), body(found), *self._plots(found, grid, page)])

    def words(self, data: Path, output: Path) -> list[str]:
        """What `deltalens` is told."""
        folders = self._folders(data, output)
        given = [word for name, folder in folders.items() for word in ("--data", f"{name}={folder}")]
        kept = ["--cache-features", str(output.with_name(f"{output.name}-features"))] if self.kept_features else []
        return ["compare", str(self.file), *given, "--output", str(output), "--threads", "1", *kept]

    def _command(self) -> str:
        """The same for a reader, without the folders of this machine."""
        study = self.file.relative_to(ROOT).as_posix() if self.file.is_relative_to(ROOT) else self.file.name
        words = self.words(Path("DATA"), Path("RUNS", self.name))
        return " ".join(["deltalens", *(study if word == str(self.file) else word for word in words)])

    def grid(self, data: Path, output: Path) -> Grid:
        return Grid(read_study(self.file, {name: str(at) for name, at in self._folders(data, output).items()}), output)

    def _folders(self, data: Path, output: Path) -> dict[str, Path]:
        """Name of a dataset -> the folder that the study reads."""
        return {name: output.with_name(name) if self.prepare else data / below for name, below in self.data.items()}

    def _plots(self, found: StudyTable, grid: Grid, page: Page) -> list[str]:
        lines = []
        for kind, words in self.plots.items():
            drawn = {f"{self.name}-{kind}-{name}.svg": svg for name, svg in draw(kind, found, grid.study).items()}
            for file in page.pictures.glob(f"{self.name}-{kind}-*.svg"):  # of earlier backbones and datasets
                if file.name not in drawn:
                    file.unlink()
            for name, svg in drawn.items():
                write_text(page.pictures / name, svg)
                lines.append(f"![{words}]({page.images}/{name})")
        return lines


def incomplete(found: StudyTable) -> str:
    """Which methods lack seeds; empty where every run is finished or has failed."""
    states = Counter(row.status for row in found.rows)
    if not states["open"]:
        return ""
    lacking: dict[str, list[str]] = {}
    tasks = tasks_of(found.cells)
    for task in tasks:
        own = [cell for cell in found.cells if (cell.backbone, cell.dataset) == task]
        where = f" ({', '.join(task)})" if len(tasks) > 1 else ""
        for seeds in dict.fromkeys(_seeds(cell) for cell in own if cell.left):
            labels = [cell.variant.label for cell in own if cell.left and _seeds(cell) == seeds]
            names = "every method" if len(labels) == len(own) > 1 else ", ".join(labels)
            lacking.setdefault(seeds, []).append(names + where)
    said = "; ".join(f"{seeds}: {', '.join(names)}" for seeds, names in lacking.items())
    return f"**Incomplete:** {states['finished']} of {len(found.rows)} runs are finished. {said}."


def _seeds(cell: Cell) -> str:
    finished = len(cell.accuracies)
    total = finished + cell.left + len(cell.failures_of_finals)
    return f"{finished} of {total} seed{'s' if total != 1 else ''}"


def body(found: StudyTable) -> str:
    """The study's own tables, below the page's headings. Tasks without a result are left out, and a single task needs
    no heading."""
    head, *sections = re.split(r"^(?=## )", found.to_markdown().partition("\n\n")[2], flags=re.M)
    tasks = tasks_of(found.cells)
    for task in tasks:
        title = f"## {', '.join(task)}\n\n"
        results = [cell.mean for cell in found.cells if (cell.backbone, cell.dataset) == task]
        if all(mean is None for mean in results):
            sections = [section for section in sections if not section.startswith(title)]
        elif len(tasks) == 1:
            sections = [section.removeprefix(title) for section in sections]
    text = re.sub(r"^## ", "### ", "".join([head, *sections]), flags=re.M)
    return re.sub(r"^\|.*$", lambda row: _narrow(row[0]), text.strip(), flags=re.M)


def _narrow(row: str) -> str:
    """A row of a Markdown table without the spaces that align it."""
    return re.sub(r"-{3,}", "---", re.sub(r" +", " ", row))
