"""The tables of docs/results.md: the study behind each, its data, and its plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltalens.studies.grid import Grid
from deltalens.studies.study_reader import read_study

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "benchmarks/studies"


@dataclass(frozen=True)
class Table:
    """data: name of a dataset in the study -> its folder below --data. time: what it took on two busy CPU cores.
    plots: kind of plot (see `plots.py`) -> words for those who do not see it. kept_features: whether the study may keep
    features, in a folder beside its runs."""

    name: str
    data: Mapping[str, str]
    time: str
    plots: Mapping[str, str]
    kept_features: bool = False
    study: Path | None = None

    @property
    def file(self) -> Path:
        return self.study or STUDIES / f"{self.name}.yaml"

    def folders(self, data: Path) -> dict[str, Path]:
        return {name: data / folder for name, folder in self.data.items()}

    def words(self, data: Path, output: Path) -> list[str]:
        """What `deltalens` is told."""
        given = [word for name, folder in self.folders(data).items() for word in ("--data", f"{name}={folder}")]
        kept = ["--cache-features", str(output.with_name(f"{output.name}-features"))] if self.kept_features else []
        return ["compare", str(self.file), *given, "--output", str(output), "--threads", "1", *kept]

    def grid(self, data: Path, output: Path) -> Grid:
        study = read_study(self.file, {name: str(folder) for name, folder in self.folders(data).items()})
        return Grid(study, output)

    def describe(self) -> str:
        """What --list says."""
        needs = ", ".join(self.data.values())
        return f"{self.name}: {self.file.name}\n  needs {needs} below --data\n  takes {self.time} on one CPU core"


TABLES = {
    table.name: table
    for table in (
        Table(
            "methods",
            {"signs": "cls/sign_digits"},
            "1 h 50 min",
            {"parameters": "Test accuracy against trained parameters"},
        ),
        Table(
            "ablations",
            {"signs": "cls/sign_digits"},
            "25 min",
            {"curves": "Test accuracy over prompts, prompted blocks, and bottleneck"},
        ),
        Table(
            "two-tasks",
            {"grocery": "cls/grocery43", "caltech": "cls/caltech101"},
            "40 min",
            {"tasks": "Test accuracy on groceries against that on objects"},
            kept_features=True,
        ),
    )
}
