"""A dense run as one HTML page: metrics, a table by class, confusion, example pictures beside their truth."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.dense_measure import COUNTS, Found, Measured
from deltalens.studies.dense_pictures import drawn
from deltalens.studies.dense_words import metric_words
from deltalens.studies.plots import Curve, curves
from deltalens.studies.report import conditions_section, head, page, plots_section

LONGEST = 560  # pixels of an example's longer side
LARGEST_MATRIX, SHOWN_PAIRS = 24, 20


@dataclass(frozen=True)
class DenseReport:
    """What the page shows. part: of the data, which was measured. history: rows of epochs, with "train_loss" and
    "val_..."."""

    title: str
    part: str
    measured: Measured
    examples: Sequence[Found]
    conditions: Mapping[str, str]
    history: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def write_dense_report(report: DenseReport, path: str | os.PathLike) -> None:
    """Write the page; it needs no other file and no network."""
    write_text(path, render_dense_report(report))


def render_dense_report(report: DenseReport) -> str:
    """The page as text."""
    measured = report.measured
    counted = f"{measured.images:,} {'test' if report.part == 'test' else report.part} images"
    sections = [
        head(report.title, ""),
        _metrics(measured, counted),
        _training(report.history, measured.task),
        _classes(measured),
        _confusion(measured),
        _examples(report.examples, list(measured.per_class), measured.threshold),
        conditions_section(report.conditions),
    ]
    return page(report.title, sections)


def _metrics(measured: Measured, counted: str) -> str:
    rows = "\n".join(
        f"<tr><td>{escape(metric_words(name, measured.task))}</td><td>{_number(value)}</td></tr>"
        for name, value in measured.values.items()
    )
    return (
        f'<section>\n<h2>Results</h2>\n<p class="note">Measured on {counted}.</p>\n'
        f"<table>\n<tbody>\n{rows}\n</tbody>\n</table>\n</section>"
    )


def _training(history: Sequence[Mapping[str, Any]], task: str) -> str:
    if len(history) < 2:
        return ""
    figures = [
        (
            "Training loss",
            curves(
                [Curve("loss", [row["train_loss"] for row in history], 1)], "mean loss of the epoch", as_percent=False
            ),
        )
    ]
    known = ("val_miou", "val_mask_map", "val_map", "val_map50", *(["val_map50_voc07"] if task == "oriented" else []))
    shown = [name for name in known if name in history[0]]
    lines = [
        Curve(metric_words(name.removeprefix("val_"), task), [row[name] for row in history], number)
        for number, name in enumerate(shown, 1)
        if all(math.isfinite(row[name]) for row in history)
    ]
    if lines:
        figures.append(("Validation", curves(lines, "%", as_percent=True)))
    return plots_section("Training", figures)


def _classes(measured: Measured) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("Class", *measured.columns))
    rows = []
    for number, (name, row) in enumerate(measured.per_class.items()):
        cells = "".join(
            _cell(column, row[column], first) for first, column in zip([True, *[False] * 9], row, strict=False)
        )
        rows.append(f'<tr class="c{number % 8}"><td>{escape(name)}</td>{cells}</tr>')
    note = "IoU and AP of 0 to 1; a dash where the data do not have the class, which is then left out of the means."
    return (
        f'<section>\n<h2>By class</h2>\n<p class="note">{note}</p>\n'
        f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n</section>"
    )


def _cell(column: str, value: float, with_bar: bool) -> str:
    text = Measured.text(column, value)
    if column in COUNTS or not with_bar or math.isnan(value):
        return f'<td data-label="{escape(column)}">{text}</td>'
    bar = f'<span class="bar"><i style="width:{100 * value:.1f}%"></i></span>'
    return f'<td class="accuracy" data-label="{escape(column)}">{text}{bar}</td>'


# ------------------------------------------------------------------ confusion
def _confusion(measured: Measured) -> str:
    counts, names = measured.confusion, measured.confused
    if measured.threshold is None:
        said = "Of the pixels of each true class (row), the share that was called what (column), in per cent."
    else:
        said = (
            "Of the objects of each true class (row), the share that was found as what (column), in per cent, by boxes "
            f"with an IoU of at least 0.5 and a score of at least {measured.threshold:g}; column “nothing”: missed. "
            "Row “nothing”: how many detections of each class there were where no object is."
        )
    table = (
        _matrix(counts, names, measured.threshold is not None)
        if len(names) <= LARGEST_MATRIX
        else _pairs(counts, names)
    )
    return f'<section>\n<h2>Confusion</h2>\n<p class="note">{said}</p>\n{table}\n</section>'


def _matrix(counts: Any, names: Sequence[str], last_is_nothing: bool) -> str:
    header = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        total = int(counts[i].sum())
        nothing = last_is_nothing and i == len(names) - 1
        cells = ""
        for j in range(len(names)):
            share = counts[i, j] / total if total else 0.0
            text = f"{int(counts[i, j]):,}" if nothing else f"{100 * share:.0f}" if total else "-"
            text = "" if text == "0" else text
            hue = "var(--right)" if i == j else "var(--wrong)"
            strength = 0 if nothing else round(70 * share)
            colour = f' style="background:color-mix(in srgb, {hue} {strength}%, transparent)"' if strength else ""
            cells += f"<td{colour}>{text}</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="wide-table"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def _pairs(counts: Any, names: Sequence[str]) -> str:
    """Of many classes the confusions that are most frequent."""
    pairs = [(int(counts[i, j]), i, j) for i in range(len(names)) for j in range(len(names)) if i != j and counts[i, j]]
    rows = "\n".join(
        f"<tr><td>{escape(names[i])}</td><td>{escape(names[j])}</td><td>{count:,}</td>"
        f"<td>{100 * count / counts[i].sum():.1f} %</td></tr>"
        for count, i, j in sorted(pairs, reverse=True)[:SHOWN_PAIRS]
    )
    header = "".join(f"<th>{name}</th>" for name in ("True class", "found as", "how often", "of the true class"))
    return f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


# ------------------------------------------------------------------ pictures
def _examples(examples: Sequence[Found], class_names: Sequence[str], threshold: float | None) -> str:
    if not examples:
        return ""
    figures = []
    for found in examples:
        pair = [("truth", found.true)] if found.true is not None else []
        name = os.path.basename(found.name)
        for said, each in (*pair, (_found_words(found, threshold), found)):
            assert each is not None
            caption = f"{name}: {said}"
            source, said = data_url(drawn(each, class_names)), escape(caption, quote=True)
            image = f'<img src="{source}" alt="{said}" style="width:100%">'
            figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>")
    return '<section>\n<h2>Examples</h2>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>\n</section>"


def _found_words(found: Found, threshold: float | None) -> str:
    """Of objects with the least score that is drawn, so that an empty picture says why."""
    if threshold is None:
        return "found"
    return f"{len(found.detections) or 'nothing'} found with a score of {threshold:g} or more"


def data_url(image: Image.Image, longest: int = LONGEST) -> str:
    """A picture inside a page, with a long side of at most so many pixels."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
