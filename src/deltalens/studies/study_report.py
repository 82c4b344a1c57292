"""A study as one HTML page that needs nothing else: protocol, table, plots, ranks, tests, curves, failures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.cells import RunRow
from deltalens.studies.grid import Grid
from deltalens.studies.plots import colour
from deltalens.studies.plots_storage import storage_plot
from deltalens.studies.protocol import counted, searches_rates_only
from deltalens.studies.published_table import only_published, overview_columns, published_columns, published_rows
from deltalens.studies.report import NO_NETWORK, STYLE
from deltalens.studies.results import bytes_text, percent_text, seconds_text
from deltalens.studies.significance import LEVEL, Comparisons, PairedTest, compare_with, rank_methods, tasks_of
from deltalens.studies.storage import storage_table, study_storage
from deltalens.studies.study import Study
from deltalens.studies.study_details import Details, read_details
from deltalens.studies.study_panels import image_panels, size_panels
from deltalens.studies.study_plots import halves_plots, method_numbers
from deltalens.studies.study_report_examples import example_sections
from deltalens.studies.study_report_plots import (
    MOST_TASKS,
    curve_figures,
    panel_figures,
    parameter_figures,
    rank_figure,
    task_figures,
)
from deltalens.studies.study_table import EDGE, StudyTable, measured_text, overview, rates_only
from deltalens.studies.transfer_table import transfer_tables
from deltalens.studies.vtab_table import published_vtab_rows, vtab_rows

PAIRED = {
    "task": "A pair is a task: a dataset on a backbone, the mean over seeds. Tasks that share data or a backbone are "
    "no independent samples.",
    "seed": "A pair is a seed, the mean over all tasks: so the test speaks of chance in training on this data, and "
    "not of other data.",
}


def write_study_report(grid: Grid, table: StudyTable, path: str | os.PathLike) -> None:
    """Write the page of what is there of a study, to a folder from which the runs' folders are found."""
    write_text(path, render_study_report(table, grid.study, read_details(grid)))


def render_study_report(table: StudyTable, study: Study, details: Details) -> str:
    """The page as text."""
    numbers = method_numbers(table.cells)
    sections = [
        _head(table, study, details),
        *_transfer(table, numbers),
        _figures("Base and novel classes", _HALVES, list(halves_plots(table, numbers).items())),
        _overview(table, numbers),
        *_vtab(table, numbers),
        _figures(
            "Accuracy against trained parameters", _parameters_note(table), parameter_figures(table.cells, numbers)
        ),
        _figures("Accuracy against training images", _CURVES_OVER, panel_figures(image_panels(table), numbers)),
        _figures("Accuracy against the size of the backbone", _CURVES_OVER, panel_figures(size_panels(table), numbers)),
        _two_tasks(table, study, numbers),
        _ranks(table, numbers),
        _tests(table, study, numbers),
        _figures("Validation accuracy during training", _CURVES, curve_figures(table, details, numbers)),
        *example_sections(table, details.examples, details.pictures),
        *_storage(table, numbers),
        *(_task_table(table, task, numbers) for task in tasks_of(table.cells)),
        _failures(table.rows),
        _run_list(table.rows),
        _conditions(study, details),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">\n'
        f"<title>{escape(table.title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(section for section in sections if section) + "\n</main>\n</body>\n</html>\n"
    )


_HALVES = (
    "Up and to the right is better; bars are one standard deviation. Dashed: the row that others are compared with."
)
_CURVES_OVER = "Mean over seeds; bars are one standard deviation. plots/ has these too."
_CURVES = "Mean over seeds of the final runs; bands are one standard deviation."


def _parameters_note(table: StudyTable) -> str:
    more = " Plots of single tasks are in plots/." if len(tasks_of(table.cells)) > MOST_TASKS else ""
    return "Mean over seeds; bars are one standard deviation." + more


# ------------------------------------------------------------------ what was compared
def _head(table: StudyTable, study: Study, details: Details) -> str:
    states = {state: sum(row.status == state for row in table.rows) for state in ("finished", "failed", "open")}
    said = [f"{states['finished']} of {len(table.rows)} runs are finished"]
    said += [f"{states['failed']} failed"] if states["failed"] else []
    said += [f"{states['open']} are to come"] if states["open"] else []
    made = ". ".join([", ".join(said), *([details.when_and_where] if details.when_and_where else [])])
    return (
        f"<header>\n<h1>{escape(table.title)}</h1>\n<p>{escape(grid_text(study, table))}</p>\n"
        f"<p>{escape(table.description)} {escape(_split_text(study))}</p>\n"
        f'<p class="note">{escape(made)}.</p>\n</header>'
    )


def grid_text(study: Study, table: StudyTable) -> str:
    """ "5 methods x 2 backbones x 3 datasets x 3 seeds: 90 final runs, and 60 that choose learning rates." """
    sizes = {"method": study.variants, "backbone": study.backbones, "dataset": study.datasets, "seed": study.seeds}
    product = " × ".join(counted(len(entries), name) for name, entries in sizes.items())
    searches = sum(row.stage == "search" for row in table.rows)
    what = "learning rates" if searches_rates_only(study) else "settings"
    chosen = f", and {searches} that choose {what}" if searches else ""
    return f"{product}: {counted(len(table.rows) - searches, 'final run')}{chosen}."


def _split_text(study: Study) -> str:
    split = study.split
    return (
        f"Folders without a validation or test part are split once for all runs, by seed {split.seed}: "
        f"{100 * split.val_fraction:g} % for validation, {100 * split.test_fraction:g} % for the test."
    )


# ------------------------------------------------------------------ tables
def html_table(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    classes: Sequence[str] | None = None,
    large: int | None = None,
) -> str:
    """A table of cells that are HTML already; headers are text. classes: of the rows. On a narrow screen every row
    becomes a small card; large: the column that stands beside its name there."""
    names = "".join(f"<th>{escape(name)}</th>" for name in header)
    kinds = ["accuracy" if column == large else "value" for column in range(len(header))]
    rows = []
    for index, (first, *rest) in enumerate(body):
        kind = f' class="{classes[index]}"' if classes else ""
        cells = "".join(
            f'<td class="{kinds[column]}" data-label="{escape(name)}">{cell}</td>'
            for column, (name, cell) in enumerate(zip(header[1:], rest, strict=True), 1)
        )
        rows.append(f"<tr{kind}><td>{first}</td>{cells}</tr>")
    joined = "\n".join(rows)
    return (
        f'<div class="wide-table"><table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{joined}\n</tbody>\n</table></div>'
    )


def _section(title: str, note: str, content: str) -> str:
    said = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{content}\n</section>"


def _method(label: str) -> str:
    return f'<span class="method">{escape(label)}</span>'


def _overview(table: StudyTable, numbers: dict[str, int]) -> str:
    """The accuracies of all tasks beside each other, where there are several."""
    if len(tasks_of(table.cells)) < 2:
        return ""
    header, body = overview(table.cells)
    best = [
        max((value for _, value in column if value is not None), default=None)
        for column in zip(*body.values(), strict=True)
    ]
    rows = [
        [_method(label), *(_marked(text, value, top) for (text, value), top in zip(line, best, strict=True))]
        for label, line in body.items()
    ]
    title = f"{measured_text(table.cells).capitalize()}, %"
    shown = published_rows(table.published_here, overview_columns(tasks_of(table.cells)))
    rows += [[escape(label), *line] for label, line in shown]
    classes = [colour(numbers[label]) for label in body] + ["published"] * len(shown)
    note = "The best of each column is bold. Mean: over all columns, where every one of them has a result."
    return _section(title, note, html_table(["Method", *header], rows, classes))


def _transfer(table: StudyTable, numbers: dict[str, int]) -> list[str]:
    """Novel classes and other datasets."""
    sections = []
    for found in transfer_tables(table):
        best = found.best()
        rows = [
            [_method(label), *(_marked(score.text, score.value, top) for score, top in zip(row, best, strict=True))]
            for label, row in found.body.items()
        ]
        rows += [[escape(name), *texts] for name, texts in found.published]
        classes = [colour(numbers[label]) for label in found.body] + ["published"] * len(found.published)
        header = ["Method", *(name[0].upper() + name[1:] for name in found.header)]
        sections.append(_section(found.title, found.note, html_table(header, rows, classes, large=len(header) - 1)))
    return sections


def _vtab(table: StudyTable, numbers: dict[str, int]) -> list[str]:
    """Group means and total parameters for every backbone, where all datasets are VTAB-1k's."""
    sections = []
    for backbone in dict.fromkeys(cell.backbone for cell in table.cells) if table.vtab_tasks else ():
        cells = [cell for cell in table.cells if cell.backbone == backbone]
        header, body, note = vtab_rows(cells, table.vtab_tasks)
        rows = [[_method(label), *(escape(text) for text in rest)] for label, *rest in body]
        shown = published_vtab_rows(backbone, table.vtab_tasks, table.published)
        rows += [[escape(label), *line] for label, *line in shown]
        classes = [colour(numbers[label]) for label, *_ in body] + ["published"] * len(shown)
        sections.append(_section(f"VTAB-1k, {backbone}", note, html_table(["Method", *header[1:]], rows, classes)))
    return sections


def _storage(table: StudyTable, numbers: dict[str, int]) -> list[str]:
    """Bytes on disk for every backbone, where the results say them."""
    sections = []
    for backbone, found in study_storage(table.cells, table.sources).items():
        header, body, note = storage_table(found, not table.vtab_tasks)
        rows = [[_method(label), *(escape(text) for text in rest)] for label, *rest in body]
        drawn = html_table(["Method", *header[1:]], rows, [colour(numbers[row.method]) for row in found])
        figure = f"<figure><figcaption>{escape(backbone)}</figcaption>{storage_plot(found, numbers)[0]}</figure>"
        sections.append(_section(f"Storage, {backbone}", note, f'{drawn}\n<div class="plots">\n{figure}\n</div>'))
    return sections


def _marked(text: str, value: float | None, best: float | None) -> str:
    return f'<span class="best">{escape(text)}</span>' if value is not None and value == best else escape(text)


def _task_table(table: StudyTable, task: tuple[str, str], numbers: dict[str, int]) -> str:
    cells = [cell for cell in table.cells if (cell.backbone, cell.dataset) == task]
    best = max((cell.mean for cell in cells if cell.mean is not None), default=None)
    with_memory = any(cell.memory is not None for cell in cells)
    columns = published_columns(table.published_here, *task)
    rest = ["Trained parameters", "With head", "% of backbone"]
    rest += ["Learning rate" if rates_only(cells) else "Settings", "Time for training"]
    rest += ["GPU memory"] if with_memory else []
    header = ["Method", measured_text(cells).capitalize() + ", %", *(name.capitalize() for name, _ in columns), *rest]
    body = []
    for cell in cells:
        counted_ = cell.adapter_parameters is not None
        line = [
            _method(cell.variant.label),
            _marked(cell.accuracy_text(), cell.mean, best),
            *(known.get(cell.variant.label, "") for _, known in columns),
            f"{cell.adapter_parameters:,}" if counted_ else "",
            f"{cell.with_head:,}" if counted_ else "",
            percent_text(cell.percent) if counted_ else "",
            escape(cell.settings_text()) if cell.chosen else "",
            "" if cell.seconds is None else seconds_text(cell.seconds),
        ]
        body.append(line + ([bytes_text(cell.memory) if cell.memory is not None else ""] if with_memory else []))
    note = f"* {EDGE}" if any(cell.at_edge for cell in cells) else ""
    others = only_published(columns, [cell.variant.label for cell in cells])
    body += [
        [escape(label), "", *(known.get(label, "") for _, known in columns), *[""] * len(rest)] for label in others
    ]
    classes = [colour(numbers[cell.variant.label]) for cell in cells] + ["published"] * len(others)
    return _section(f"{task[0]}, {task[1]}", note, html_table(header, body, classes, large=1))


# ------------------------------------------------------------------ plots, ranks, tests
def _figures(title: str, note: str, figures: Sequence[tuple[str, str]]) -> str:
    if not figures:
        return ""
    drawn = "\n".join(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in figures)
    return _section(title, note, f'<div class="plots">\n{drawn}\n</div>')


def _two_tasks(table: StudyTable, study: Study, numbers: dict[str, int]) -> str:
    pair = study.scatter_datasets
    if pair is None:
        return ""
    figures = task_figures(table.cells, pair, numbers)
    full = any(variant.is_full for variant in study.variants)
    note = "Up and to the right is better; bars are one standard deviation." + (
        " Dashed: full fine-tuning; beyond both lines a method is better on both tasks." if full else ""
    )
    return _figures(f"Two tasks: {pair[0]} and {pair[1]}", note, figures)


def _ranks(table: StudyTable, numbers: dict[str, int]) -> str:
    ranking = rank_methods(table.cells)
    if ranking is None or len(ranking.tasks) < 2:
        return ""
    of_all = len(tasks_of(table.cells))
    used = f"{len(ranking.tasks)} of {of_all}" if len(ranking.tasks) < of_all else f"all {of_all}"
    note = f"Ranks in {used} tasks (a dataset on a backbone) in which every method has a result; equals share a rank. "
    note += "Dot: the mean; line: one standard deviation over tasks; strokes: the ranks that occurred."
    note += f" Without a result: {', '.join(ranking.left_out)}." if ranking.left_out else ""
    if ranking.friedman is not None:
        note += f" Friedman's test that all methods are alike: p = {p_text(ranking.friedman)}."
    if ranking.distance is not None:
        note += f" Mean ranks more than {ranking.distance:.2f} apart differ (Nemenyi, {LEVEL})."
    return _figures("Mean ranks", note, [("Mean rank over tasks", rank_figure(ranking, numbers))])


def _tests(table: StudyTable, study: Study, numbers: dict[str, int]) -> str:
    found = compare_with(study.reference_label, table.rows, table.cells)
    if not found.rows:
        return ""
    header = ["Method", "Difference, points", "Better in", "Pairs", "Test", "p", "p, Holm"]
    rows = [[_method(test.label), *_test_cells(test)] for test in found.rows]
    title = f"Against {found.reference}"
    return _section(title, _test_note(found), html_table(header, rows, [colour(numbers[t.label]) for t in found.rows]))


def _test_cells(test: PairedTest) -> list[str]:
    mean = "-" if test.mean is None else f"{100 * test.mean:+.1f}".replace("-", "−")
    better = "-" if not test.pairs else f"{test.wins} of {test.pairs}" + (f", {test.ties} equal" if test.ties else "")
    adjusted = "-" if test.adjusted is None else p_text(test.adjusted)
    if test.adjusted is not None and test.adjusted < LEVEL:
        adjusted = f'<span class="best">{adjusted}</span>'
    return [mean, better, str(test.pairs), test.test, "-" if test.p is None else p_text(test.p), adjusted]


def _test_note(found: Comparisons) -> str:
    note = f"Paired, two-sided tests of the difference to {found.reference}. {PAIRED[found.unit]} "
    note += "Wilcoxon's signed-rank test for six pairs or more, the paired t-test for three to five. "
    tested = [test for test in found.rows if test.p is not None]
    if not tested:
        return note + "There are too few runs for a test."
    note += f"Holm: corrected for {counted(len(tested), 'test')}; bold below {LEVEL}."
    exact = [test.pairs for test in tested if test.test == "Wilcoxon"]
    if exact:
        least = 2 / 2 ** max(exact)
        note += f" With {max(exact)} pairs no p can be smaller than {p_text(least)}"
        note += ", so that after the correction none can be below 0.05." if least * len(tested) >= LEVEL else "."
    return note


def p_text(p: float) -> str:
    """0.031, 0.0004, < 0.0001."""
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


# ------------------------------------------------------------------ runs
def _failures(rows: Sequence[RunRow]) -> str:
    items = "\n".join(
        f"<li>{_link(row)}: {escape(row.message or 'no message')}</li>" for row in rows if row.status == "failed"
    )
    note = "Left as they are; --retry-failed tries them again."
    return _section("Failed runs", note, f'<ul class="failed">\n{items}\n</ul>') if items else ""


def _link(row: RunRow) -> str:
    what = f"search, {row.settings}" if row.stage == "search" else f"seed {row.seed}"
    text = f"{row.backbone}, {row.dataset}, {row.method}, {what}"
    return f'<a href="{escape(quote(row.folder, safe="/+="))}/">{escape(text)}</a>'


def _run_list(rows: Sequence[RunRow]) -> str:
    def per_cent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    body = [
        [
            _link(row) if row.status != "open" else _link(row).partition(">")[2].removesuffix("</a>"),
            row.status,
            per_cent(row.val_accuracy),
            per_cent(row.test_accuracy),
            escape(row.settings or ""),
            "" if row.training_seconds is None else seconds_text(row.training_seconds),
        ]
        for row in rows
    ]
    header = ["Run", "State", "Validation, %", "Test, %", "Settings", "Training"]
    content = f"<details><summary>{counted(len(rows), 'run')}</summary>\n{html_table(header, body)}\n</details>"
    return _section("Runs", "Each leads to its folder, beside this page. runs.csv holds the same.", content)


def _conditions(study: Study, details: Details) -> str:
    entries = {
        "Backbones": ", ".join(f"{each.label} ({each.model})" for each in study.backbones),
        "Datasets": ", ".join(each.name for each in study.datasets),
        "Machine": "; ".join(details.machines),
        "Versions": "; ".join(details.versions),
    }
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items() if text)
    return f"<section>\n<h2>What was run</h2>\n<dl>\n{items}\n</dl>\n</section>"
