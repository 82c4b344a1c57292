"""Numbers that a paper has published, for the rows and datasets of a study: shown beside what was measured, never
part of a mean, a rank, a test, or the choice of the best.

    published:
      source: Mona, CVPR 2025
      note: tested after every epoch
      backbone: Swin-L                          # of which backbone they are; needed where a study has several
      scores:
        Full: {flowers102: 99.5772, mean: 92.7876}
        Mona: {flowers102: {base: 99.7, novel: 80.1}}      # a name for each number where there are several; base and
                                                           # novel stand in the tables of base-to-novel studies
      not_run:                                  # rows that the study does not run
        Adapter+: {flowers102: 99.59}

Scores are in per cent. A dataset of the study is named as it is there; `mean` is that over all of its datasets (not
shown where some are left out), and `Natural`, `Specialized`, `Structured` are the group means of VTAB-1k. Several
sources are a list of such mappings. Numbers of a dataset stand beside the whole of it, not beside a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltalens.data.vtab1k import GROUPS, task_of
from deltalens.studies.study_yaml import Document, Place

if TYPE_CHECKING:
    from deltalens.studies.study import Study

FIELDS = ("source", "note", "backbone", "scores", "not_run")
MEAN = "mean"
BASE, NOVEL = "base", "novel"  # the names of numbers in base-to-novel studies


@dataclass(frozen=True)
class PublishedScore:
    """One number of a paper, in per cent. column: a dataset, a group of VTAB-1k, or "mean". metric: its name where the
    source gives several numbers for a dataset, "" for what the study measures itself."""

    label: str
    column: str
    metric: str
    percent: float

    @property
    def text(self) -> str:
        """As the source prints it."""
        return f"{self.percent:.10g}"


@dataclass(frozen=True)
class Published:
    """The numbers of one source for one backbone. not_run: labels of rows that the study does not run."""

    source: str
    backbone: str
    scores: tuple[PublishedScore, ...]
    not_run: frozenset[str] = frozenset()
    note: str = ""

    def metrics(self, column: str) -> list[str]:
        """The names of the numbers that there are for a column."""
        return list(dict.fromkeys(score.metric for score in self.scores if score.column == column))


def read_published(document: Document, value: Any, study: Study) -> tuple[Published, ...]:
    """Check the field `published` against the study's rows, datasets and backbones. ValueError with line and field."""
    if value is None:
        return ()
    if not isinstance(value, list):
        return (_read_one(document, value, ("published",), study),)
    return tuple(_read_one(document, each, ("published", index), study) for index, each in enumerate(value))


def _read_one(document: Document, value: Any, place: Place, study: Study) -> Published:
    entry = document.mapping(value, place, FIELDS)
    labels = [variant.label for variant in study.variants]
    scores = document.mapping(entry.get("scores") or {}, (*place, "scores"))
    others = document.mapping(entry.get("not_run") or {}, (*place, "not_run"))
    for label in scores:
        if label not in labels:
            raise document.error(
                (*place, "scores", label), f"expected a row: {', '.join(labels)}; rows that are not run go to not_run"
            )
    for label in others:
        if label in labels:
            raise document.error((*place, "not_run", label), "is a row that is run; its numbers go to scores")
    if not scores and not others:
        raise document.error(place, "has no numbers; name them under scores, row: {dataset: number}")
    columns = _columns(study)
    parts = any(each.source != each.name for each in study.datasets)
    gone = {*study.left_out, MEAN} if study.left_out or parts else set()
    found = [
        score
        for part, rows in (("scores", scores), ("not_run", others))
        for label, row in rows.items()
        for score in _row(document, label, row, (*place, part, label), columns)
        if score.column not in gone
    ]
    note = entry.get("note")
    return Published(
        document.text(entry.get("source"), (*place, "source")),
        _backbone(document, entry.get("backbone"), place, study),
        tuple(found),
        frozenset(others),
        "" if note is None else document.text(note, (*place, "note")),
    )


def _columns(study: Study) -> list[str]:
    """What scores may be of."""
    tasks = all(task_of(dataset.format, dataset.path) for dataset in study.datasets)
    names = [*dict.fromkeys(name for each in study.datasets for name in (each.source, each.name)), *study.left_out]
    names += [target.name for target in study.targets if target.name not in names]
    return [*names, *(GROUPS if tasks else ()), *([MEAN] if len(names) > 1 else [])]


def _backbone(document: Document, name: Any, place: Place, study: Study) -> str:
    labels = [backbone.label for backbone in study.backbones]
    if name is None and len(labels) > 1:
        raise document.error(place, f"needs backbone: of which one these numbers are: {', '.join(labels)}")
    if name is not None and name not in labels:
        raise document.error((*place, "backbone"), f"expected a backbone: {', '.join(labels)}; got {name!r}")
    return labels[0] if name is None else name


def _row(document: Document, label: str, row: Any, place: Place, columns: Sequence[str]) -> list[PublishedScore]:
    found = []
    for column, value in document.mapping(row, place, columns).items():
        here = (*place, column)
        named: Mapping[str, Any] = document.mapping(value, here) if isinstance(value, dict) else {"": value}
        for metric, number in named.items():
            where = (*here, metric) if metric else here
            if not 0 <= document.number(number, where) <= 100:
                raise document.error(where, f"expected per cent, from 0 to 100, got {number!r}")
            found.append(PublishedScore(label, column, metric, float(number)))
    return found


def without_halves(published: Sequence[Published]) -> tuple[Published, ...]:
    """The sources without their numbers of base and novel classes, and those that have no others not at all."""
    rest = [replace(one, scores=tuple(s for s in one.scores if s.metric not in (BASE, NOVEL))) for one in published]
    return tuple(one for one in rest if one.scores)
