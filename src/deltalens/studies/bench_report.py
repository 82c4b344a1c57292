"""What a benchmark found: rows, ratios and targets, as a table and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import deltalens


@dataclass(frozen=True)
class Row:
    """One contender: median seconds; label of a reference -> median of the per-round ratios to it; memory in bytes;
    percent: of all parameters, the trained ones, head included."""

    name: str
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    percent: float | None = None


@dataclass(frozen=True)
class Section:
    """One table, such as "training step".

    memory_reference: label and name of the row that saved bytes are shown as a share of.
    """

    title: str
    rows: list[Row]
    memory_reference: tuple[str, str] | None = None

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def saved_ratio(self, name: str, reference: str) -> float:
        """Bytes saved for backward, as a share of another row's."""
        return self.row(name).saved_bytes / self.row(reference).saved_bytes


@dataclass(frozen=True)
class Target:
    """A promise: `value` must be at most `limit`."""

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """One benchmark: what was run, its tables, and the promises it was checked against."""

    title: str
    settings: dict[str, Any]
    sections: list[Section]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for target, entry in zip(self.targets, content["targets"], strict=True):
            entry["met"] = target.met
        return content

    def to_text(self) -> str:
        described = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [self.title, described, *self.notes]
        for section in self.sections:
            lines += ["", *_table(section)]
        if self.targets:
            width = max(len(target.what) for target in self.targets)
            lines += ["", "targets"]
            lines += [
                f"  {each.what:<{width}}  {each.value:7.3f} <= {each.limit:<5}  {'met' if each.met else 'MISSED'}"
                for each in self.targets
            ]
        return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Versions and the kind of machine, without its name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "deltalens": deltalens.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def to_json(reports: Sequence[Report]) -> str:
    """All reports with the environment they were measured in."""
    content = {"environment": environment(), "reports": [report.to_dict() for report in reports]}
    return json.dumps(content, indent=2) + "\n"


def _table(section: Section) -> list[str]:
    references = list(dict.fromkeys(name for row in section.rows for name in row.ratios))
    has_percent = any(row.percent is not None for row in section.rows)
    header = [section.title, *(["trained %"] if has_percent else []), "seconds", *(f"x {name}" for name in references)]
    memory = section.memory_reference
    has_saved = any(row.saved_bytes is not None for row in section.rows)
    has_peak = any(row.peak_bytes is not None for row in section.rows)
    if has_saved:
        header += ["saved MB", *([f"saved x {memory[0]}"] if memory else [])]
    if has_peak:
        header += ["peak MB"]
    body = []
    for row in section.rows:
        trained = [] if not has_percent else ["" if row.percent is None else f"{row.percent:.2f}"]
        cells = [row.name, *trained, f"{row.seconds:.4f}"]
        cells += [f"{row.ratios[name]:.3f}" if name in row.ratios else "" for name in references]
        if has_saved:
            cells += ["" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f}"]
            if memory:
                cells += ["" if row.saved_bytes is None else f"{section.saved_ratio(row.name, memory[1]):.3f}"]
        if has_peak:
            cells += ["" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"]
        body.append(cells)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    return ["  ".join(_pad(cell, width, i) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in [header, *body]]  # fmt: skip


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
