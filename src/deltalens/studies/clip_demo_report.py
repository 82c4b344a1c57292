"""The report of the demonstration of CLIP: one HTML page in the style of the other reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.clip_demo_results import ClipComparison, ClipRun, share_text
from deltalens.studies.plots import Curve, Point, colour, curves, scatter
from deltalens.studies.plots_compare import TwoTasks, task_scatter
from deltalens.studies.report import (
    accuracy_interval,
    conditions_section,
    head,
    page,
    pictures_section,
    plots_section,
)
from deltalens.studies.results import bytes_text, count_text, percent_text, seconds_text, settings_text

COLUMNS = ("Base", "Novel", "Harmonic mean", "Trained parameters", "% of CLIP", "Training time", "Adapter file")


def write_clip_report(comparison: ClipComparison, path: str | os.PathLike) -> None:
    """Write the page: table, base against novel, cost, training curves, answers on both halves, what was run."""
    write_text(path, render_clip_report(comparison))


def render_clip_report(comparison: ClipComparison) -> str:
    """The page as text. ValueError for a comparison without runs."""
    runs = comparison.runs
    if not runs:
        raise ValueError("a report needs at least one run")
    base = [(run.method, run.base_answers) for run in runs]
    novel = [(run.method, run.novel_answers) for run in runs if run.novel is not None]
    sections = [
        head(comparison.title, comparison.intro),
        _table(comparison),
        plots_section("Base, novel and cost", _figures(runs)),
        pictures_section("Base classes: what was trained", comparison.pictures_note, comparison.base_pictures, base),
    ]
    if novel:
        note = "Classes of which no method has seen a picture: their names alone are given."
        sections.append(pictures_section("Novel classes: names alone", note, comparison.novel_pictures, novel))
    return page(comparison.title, [*sections, _adapters(runs), conditions_section(comparison.conditions)])


# ------------------------------------------------------------------ sections
def _table(comparison: ClipComparison) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("Method", *COLUMNS))
    rows = "\n".join(_row(run, number) for number, run in enumerate(comparison.runs))
    widths = [100 * accuracy_interval(run.base, comparison.base_images) for run in comparison.runs]
    refused = [f"{run.method}: {run.refusal}." for run in comparison.runs if run.refusal]
    said = f" A dash: no answer for classes that were not trained. {' '.join(refused)}" if refused else ""
    return (
        "<section>\n<h2>Results</h2>\n"
        f'<p class="note">Accuracy on {comparison.base_images:,} test pictures of the base classes, which were '
        f"trained, among these, and on {comparison.novel_images:,} of the novel classes, which were not, among those; "
        f"differences of less than about {max(widths):.1f} points may be chance. The harmonic mean is near the smaller "
        f"of the two.{escape(said)}</p>\n"
        f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</section>"
    )


def _row(run: ClipRun, number: int) -> str:
    mean = run.mean or 0.0
    bar = f'<span class="bar"><i style="width:{100 * mean:.1f}%"></i></span>'
    shown = (
        share_text(run.novel),
        f"{share_text(run.mean)}{bar if run.mean is not None else ''}",
        f"{run.parameters:,}",
        f"{percent_text(run.percent)} %",
        seconds_text(run.seconds) if run.parameters else "-",
        bytes_text(run.adapter_bytes) if run.folder else "-",
    )
    return (
        f'<tr class="{colour(number)}"><td><span class="method">{escape(run.method)}</span>'
        f'<span class="settings">{escape(settings_text(run.settings))}</span></td>'
        f'<td class="accuracy" data-label="{COLUMNS[0]}">{share_text(run.base)}</td>'
        + "".join(
            f'<td data-label="{escape(label)}">{cell}</td>' for label, cell in zip(COLUMNS[1:], shown, strict=True)
        )
        + "</tr>"
    )


def _figures(runs: Sequence[ClipRun]) -> list[tuple[str, str]]:
    numbered = list(enumerate(runs))
    both = [TwoTasks(r.method, r.base, r.novel, None, None, i, lines=not r.parameters)
            for i, r in numbered if r.novel is not None]  # fmt: skip
    figures = []
    if both:
        title = "Novel against base classes (dashed: nothing trained)"
        figures.append((title, task_scatter(both, "accuracy on base classes, %", "accuracy on novel classes, %")))
    cost = [Point(r.method, r.parameters, r.base, number=i) for i, r in numbered if r.parameters]
    if cost:
        plot = scatter(cost, "trained parameters", "accuracy on base classes, %", count_text)
        figures.append(("Base accuracy against trained parameters", plot))
    trained = [(i, r) for i, r in numbered if r.epochs]
    if trained:
        accuracy = [Curve(r.method, [e.val_accuracy for e in r.epochs], i) for i, r in trained]
        loss = [Curve(r.method, [e.train_loss for e in r.epochs], i) for i, r in trained]
        title = "Validation accuracy during training, base classes"
        figures.append((title, curves(accuracy, "validation accuracy, %", as_percent=True)))
        figures.append(("Training loss", curves(loss, "mean loss of the epoch", as_percent=False)))
    return figures


def _adapters(runs: Sequence[ClipRun]) -> str:
    saved = [run for run in runs if run.folder]
    if not saved:
        return ""
    free = [run for run in saved if run.mean is not None] or saved
    best = max(free, key=lambda run: run.mean or 0.0).folder
    folders = ", ".join(f"{escape(run.method)} in <code>{escape(str(run.folder))}</code>" for run in saved)
    code = (
        "import deltalens as dl\n\n"
        "# both towers, the adapter and the base classes, ready to predict\n"
        f'model = dl.from_pretrained("{best}")\n'
        'model.set_classes(["dotted red star", "plain green ring"])  # any others\n\n'
        "# or on the command line, with the base classes:\n"
        f"# deltalens predict {best} a-folder-of-pictures"
    )
    return (
        f'<section>\n<h2>Use an adapter</h2>\n<p class="note">Beside this page lie the adapters: {folders}.</p>\n'
        f"<pre>{escape(code)}</pre>\n</section>"
    )
