"""Tables of what trained runs do elsewhere: base-to-novel, and other datasets, as papers on CLIP lay them out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltalens.studies.harmonic_mean import harmonic_mean
from deltalens.studies.markdown import markdown_table
from deltalens.studies.published import BASE, MEAN, NOVEL, Published
from deltalens.studies.published_table import mark

if TYPE_CHECKING:
    from deltalens.studies.cells import Cell
    from deltalens.studies.study_table import StudyTable

AVERAGE = "average"
HEADER = ("base", "novel", "H")
HALVES = (
    "Trained on the base classes, the first half; novel: test images of the other half, classified among its names "
    "alone. H: the harmonic mean of the means."
)


@dataclass(frozen=True)
class Score:
    """A fraction with its standard deviation over seeds, None where there are fewer than two; value None: not known."""

    value: float | None
    spread: float | None = None

    @property
    def text(self) -> str:
        if self.value is None:
            return "-"
        return f"{100 * self.value:.1f}" + ("" if self.spread is None else f" ± {100 * self.spread:.1f}")


@dataclass(frozen=True)
class TransferTable:
    """header: without the column of names. body: label of a row -> its scores. published: (name, texts) of rows that a
    source has."""

    title: str
    note: str
    header: tuple[str, ...]
    body: Mapping[str, tuple[Score, ...]]
    backbone: str = ""
    published: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def best(self) -> list[float | None]:
        """The highest value of each column."""
        columns = zip(*self.body.values(), strict=True)
        return [max((s.value for s in column if s.value is not None), default=None) for column in columns]

    def to_markdown(self) -> list[str]:
        lines = [[label, *(score.text for score in row)] for label, row in self.body.items()]
        lines += [[name, *texts] for name, texts in self.published]
        return [f"## {self.title}", markdown_table(["method", *self.header], lines), self.note]


def transfer_tables(table: StudyTable) -> list[TransferTable]:
    """All of a study's, for every backbone; none where it tests nowhere else."""
    found: list[TransferTable] = []
    for backbone in dict.fromkeys(cell.backbone for cell in table.cells):
        cells = [cell for cell in table.cells if cell.backbone == backbone]
        published = [one for one in table.published if one.backbone == backbone]
        if table.base_to_novel:
            found += _halves(backbone, cells, table.sources, published)
        if table.targets:
            found += _targets(backbone, cells, table.targets, published)
    return found


def halves(table: StudyTable) -> dict[str, TransferTable]:
    """Backbone -> its first table of base and novel classes: the average where there are several datasets."""
    found: dict[str, TransferTable] = {}
    for each in transfer_tables(table) if table.base_to_novel else ():
        if each.header == HEADER:
            found.setdefault(each.backbone, each)
    return found


def transfer_scores(accuracies: Sequence[float], complete: bool) -> Score:
    """Of the seeds of one method; not known before all have finished."""
    if not accuracies or not complete:
        return Score(None)
    return Score(statistics.fmean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else None)


def _by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.variant.label, []).append(cell)
    return found


def _refusals(cells: Sequence[Cell]) -> str:
    said: dict[str, list[str]] = {}
    for cell in cells:
        for why in cell.refused.values():
            labels = said.setdefault(why, [])
            labels += [cell.variant.label] if cell.variant.label not in labels else []
    return "".join(f" {', '.join(labels)}: {why.rstrip('.')}." for why, labels in said.items())


# ------------------------------------------------------------------ base to novel
def _halves(
    backbone: str, cells: Sequence[Cell], sources: Mapping[str, str], published: Sequence[Published]
) -> Iterator[TransferTable]:
    """The average over datasets, for each amount of training images, then each dataset."""
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    amounts: dict[str, list[str]] = {}
    for dataset in datasets:
        amounts.setdefault(dataset.removeprefix(sources.get(dataset, dataset)), []).append(dataset)
    for amount, names in amounts.items():
        if len(names) > 1:
            row = {label: _average([c for c in each if c.dataset in names]) for label, each in _by_label(cells).items()}
            shown = () if amount else _published_halves(published, MEAN)
            title = f"Base to novel, {backbone}: average of {len(names)} datasets{amount.replace('@', ', ')}"
            yield TransferTable(title, HALVES + _refusals(cells), HEADER, row, backbone, shown)
    for dataset in datasets:
        own = [cell for cell in cells if cell.dataset == dataset]
        row = {cell.variant.label: _pair(_base(cell), _elsewhere(cell, NOVEL)) for cell in own}
        note = HALVES + _refusals(own)
        yield TransferTable(
            f"Base to novel, {backbone}: {dataset}",
            note,
            HEADER,
            row,
            backbone,
            _published_halves(published, dataset),
        )


def _base(cell: Cell) -> Score:
    return transfer_scores(cell.accuracies, cell.complete)


def _elsewhere(cell: Cell, name: str) -> Score:
    return transfer_scores(cell.transfer.get(name, ()), cell.complete)


def _pair(base: Score, novel: Score) -> tuple[Score, ...]:
    both = base.value is not None and novel.value is not None
    return base, novel, Score(harmonic_mean(base.value, novel.value) if both else None)


def _average(cells: Sequence[Cell]) -> tuple[Score, ...]:
    """Means over datasets, and the harmonic mean of those two, as papers have it."""
    return _pair(*(_mean_of(cells, of) for of in (_base, lambda cell: _elsewhere(cell, NOVEL))))


def _mean_of(cells: Sequence[Cell], of: Callable[[Cell], Score]) -> Score:
    values = [of(cell).value for cell in cells]
    return Score(None if None in values else statistics.fmean(values))


def _published_halves(published: Sequence[Published], column: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """H is computed from the two."""
    found = []
    for one in published:
        for label in dict.fromkeys(score.label for score in one.scores):
            known = {s.metric: s for s in one.scores if (s.label, s.column) == (label, column)}
            if BASE in known and NOVEL in known:
                h = harmonic_mean(known[BASE].percent, known[NOVEL].percent)
                texts = (known[BASE].text, known[NOVEL].text, f"{h:.2f}")
                found.append((f"{label}, {mark(published, one)}", texts))
    return tuple(found)


# ------------------------------------------------------------------ other datasets
def _targets(
    backbone: str, cells: Sequence[Cell], targets: Sequence[str], published: Sequence[Published]
) -> Iterator[TransferTable]:
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = [cell for cell in cells if cell.dataset == dataset]
        body = {}
        for cell in own:
            row = [_elsewhere(cell, name) for name in targets]
            body[cell.variant.label] = (_base(cell), *row, _mean_over(row))
        note = f"Trained on {dataset} alone; tested on each of the others with its own class names. "
        note += f"Average: of the {len(targets)} others." + _refusals(own)
        header = (dataset, *targets, AVERAGE)
        shown = tuple(_published_targets(published, dataset, targets))
        yield TransferTable(f"From {dataset} to other datasets, {backbone}", note, header, body, backbone, shown)


def _mean_over(scores: Sequence[Score]) -> Score:
    values = [score.value for score in scores]
    return Score(None if None in values else statistics.fmean(values))


def _published_targets(
    published: Sequence[Published], dataset: str, targets: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The average is computed where a source has all of the targets."""
    for one in published:
        for label in dict.fromkeys(score.label for score in one.scores):
            known = {s.column: s for s in one.scores if s.label == label and not s.metric}
            if any(name in known for name in targets):
                values = [known[name].percent for name in targets if name in known]
                average = f"{statistics.fmean(values):.2f}" if len(values) == len(targets) else "-"
                texts = (known[name].text if name in known else "-" for name in (dataset, *targets))
                yield f"{label}, {mark(published, one)}", (*texts, average)
