"""What the report of a study says beside its table: epochs, machine and date, as the runs' results hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltalens.studies.examples import Examples, picture_file
from deltalens.studies.grid import Grid
from deltalens.studies.main_metrics import score
from deltalens.studies.trial import Run


@dataclass(frozen=True)
class Details:
    """curves: (backbone, dataset, method) -> for each finished final run the validation accuracies after its epochs.
    machines, versions: each that occurred, most frequent first. first, last: days on which runs were finished.
    examples: (backbone, dataset, method) -> what the first seed's adapter says about the example pictures.
    pictures: (dataset, number of the image) -> its file."""

    curves: Mapping[tuple[str, str, str], Sequence[Sequence[float]]] = field(default_factory=dict)
    machines: Sequence[str] = ()
    versions: Sequence[str] = ()
    first: str | None = None
    last: str | None = None
    examples: Mapping[tuple[str, str, str], Examples] = field(default_factory=dict)
    pictures: Mapping[tuple[str, int], Path] = field(default_factory=dict)

    @property
    def when_and_where(self) -> str:
        """ "Trained from 2026-01-02 to 2026-01-03 on Linux x86_64, 8 CPU cores"; empty where nothing is known."""
        if self.first is None:
            return ""
        when = f"on {self.first}" if self.first == self.last else f"from {self.first} to {self.last}"
        where = f", on {self.machines[0]}" if self.machines else ""
        return f"Trained {when}{where}" + (" and others" if len(self.machines) > 1 else "")


def read_details(grid: Grid) -> Details:
    """Read them from the results of the finished runs."""
    curves: dict[tuple[str, str, str], list[list[float]]] = {}
    machines: dict[str, int] = {}
    versions: dict[str, int] = {}
    days: set[str] = set()
    examples: dict[tuple[str, str, str], Examples] = {}
    for run in grid.runs():
        results = run.results()
        if results is None or grid.state(run) != "finished":
            continue
        days.add(_day(run, results))
        _count(machines, results.get("machine"))
        _count(versions, ", ".join(f"{name} {number}" for name, number in (results.get("versions") or {}).items()))
        epochs = [_validation(row, results.get("main_metric")) for row in results.get("history") or []]
        if run.stage == "final" and epochs and None not in epochs:
            curves.setdefault(run.cell, []).append(epochs)
        if run.stage == "final" and run.seed == grid.study.seeds[0] and results.get("examples"):
            examples[run.cell] = Examples.from_dict(results["examples"])
    return Details(
        curves,
        sorted(machines, key=machines.__getitem__, reverse=True),
        sorted(versions, key=versions.__getitem__, reverse=True),
        min(days, default=None),
        max(days, default=None),
        examples,
        _pictures(grid, examples),
    )


def _pictures(grid: Grid, examples: Mapping[tuple[str, str, str], Examples]) -> dict[tuple[str, int], Path]:
    sources = {dataset.name: dataset.source for dataset in grid.study.datasets}  # parts of one share its pictures
    files = {
        (dataset, example.index): picture_file(grid.output, sources[dataset], example.index)
        for (_, dataset, _), own in examples.items()
        for example in own.shown
    }
    return {key: file for key, file in files.items() if file.is_file()}


def _validation(row: Mapping[str, float], wanted: str | None) -> float | None:
    return score({name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}, wanted)


def _day(run: Run, results: Mapping[str, Any]) -> str:
    """When the run was finished; runs of earlier versions do not say so, and their file's date is taken."""
    said = results.get("finished")
    return said[:10] if said else datetime.fromtimestamp(run.output.results.stat().st_mtime, UTC).date().isoformat()


def _count(found: dict[str, int], text: str | None) -> None:
    if text:
        found[text] = found.get(text, 0) + 1
