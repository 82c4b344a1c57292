"""Published numbers as they stand in a study's tables: columns, rows and a note, all marked as published."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from deltalens.studies.published import MEAN, Published


def mark(published: Sequence[Published], one: Published) -> str:
    """ "published", with the number of the source where there are several."""
    return "published" + (f" [{published.index(one) + 1}]" if len(published) > 1 else "")


def published_columns(published: Sequence[Published], backbone: str, dataset: str) -> list[tuple[str, dict[str, str]]]:
    """(header, label of a row -> number) for every source and metric that has this dataset on this backbone."""
    found = []
    for one in published:
        for metric in one.metrics(dataset) if one.backbone == backbone else ():
            numbers = {s.label: s.text for s in one.scores if (s.column, s.metric) == (dataset, metric)}
            found.append((mark(published, one) + (f", {metric}" if metric else ""), numbers))
    return found


def only_published(columns: Sequence[tuple[str, dict[str, str]]], labels: Collection[str]) -> list[str]:
    """Rows of these columns that are no rows of the study."""
    return list(dict.fromkeys(label for _, numbers in columns for label in numbers if label not in labels))


def published_rows(
    published: Sequence[Published], columns: Sequence[tuple[str, str] | None]
) -> list[tuple[str, list[str]]]:
    """(name of the row, numbers) of every source, row and metric that has any of the columns, each (backbone, column of
    the source), or None for one that no source has; "-" where there is no number."""
    found = []
    for one in published:
        for label, metric in dict.fromkeys((score.label, score.metric) for score in one.scores):
            known = {(one.backbone, s.column): s.text for s in one.scores if (s.label, s.metric) == (label, metric)}
            line = [known.get(column, "-") if column else "-" for column in columns]
            if any(text != "-" for text in line):
                name = f"{label}, {mark(published, one)}" + (f", {metric}" if metric else "")
                found.append((name, line))
    return found


def overview_columns(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str] | None]:
    """The columns of the overview: one for each (backbone, dataset), and the mean, which a source has for one
    backbone."""
    backbones = {backbone for backbone, _ in pairs}
    return [*pairs, (min(backbones), MEAN) if len(backbones) == 1 else None]


def published_note(published: Sequence[Published]) -> str:
    """Where the numbers are from, and in what they differ; "" where there are none."""
    if not published:
        return ""
    said = []
    for number, one in enumerate(published, 1):
        several = f"[{number}] " if len(published) > 1 else ""
        said.append(f"{several}{one.source}, {one.backbone}" + (f" ({one.note.rstrip('.')})" if one.note else ""))
    return f"Published numbers, not measured here: {'; '.join(said)}."


def published_runs(published: Sequence[Published]) -> Iterator[dict[str, str | float]]:
    """A line of runs.csv for every number: its stage and status are "published", its score is a fraction."""
    for one in published:
        for score in one.scores:
            yield {
                "stage": "published",
                "backbone": one.backbone,
                "dataset": score.column,
                "method": score.label,
                "status": "published",
                "message": one.source,
                "metric": score.metric,
                "published": round(score.percent / 100, 10),
            }
