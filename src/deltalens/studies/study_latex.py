"""The table of a study for a paper: LaTeX with booktabs, one table for each backbone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from deltalens.studies.cells import Cell
from deltalens.studies.published import Published
from deltalens.studies.published_table import overview_columns, published_note, published_rows
from deltalens.studies.results import bytes_text
from deltalens.studies.study_table import StudyTable, measured_text, overall
from deltalens.studies.transfer_table import Score, TransferTable, transfer_tables

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"{{{character}}}" for character in "[]*"},  # which a command before them would take for its own
    "±": r"$\pm$",
    "×": r"$\times$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
INCOMPLETE = r"\textsuperscript{\dag}"


def to_latex(table: StudyTable) -> str:
    """A `table` environment for each backbone: a row per method, a column per dataset, their mean, trained parameters
    without and with the head, seconds, and memory where it is known. The best accuracies of a column are bold. Needs
    \\usepackage{booktabs}."""
    parts = ["% needs \\usepackage{booktabs}"]
    for backbone in dict.fromkeys(cell.backbone for cell in table.cells):
        cells = [cell for cell in table.cells if cell.backbone == backbone]
        published = [one for one in table.published_here if one.backbone == backbone]
        parts.append(_backbone_table(table.title, backbone, cells, published))
    parts += [_transfer_table(table.title, found) for found in transfer_tables(table)]
    return "\n\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """The text with every character that LaTeX reads as a command written out."""
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))


def _backbone_table(title: str, backbone: str, cells: Sequence[Cell], published: Sequence[Published]) -> str:
    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.variant.label, []).append(cell)
    columns = [[row[i].mean for row in by_label.values()] for i in range(len(datasets))]
    averages = [overall(row) for row in by_label.values()] if len(datasets) > 1 else []
    best = [_best(column) for column in [*columns, averages]]
    with_memory = any(cell.memory is not None for cell in cells)
    header = ["Method", "Params", "With head", *map(escape_latex, datasets)]
    header += (["Mean"] if averages else []) + ["Time (s)"] + (["Memory"] if with_memory else [])
    lines = [header]
    for number, (label, row) in enumerate(by_label.items()):
        line = [escape_latex(label), _mean_count([c.adapter_parameters for c in row])]
        line.append(_mean_count([c.with_head for c in row]))
        line += [_accuracy(cell, best[i]) for i, cell in enumerate(row)]
        line += [_number(averages[number], best[-1])] if averages else []
        line.append(
            _mean_text([cell.seconds for cell in row], lambda value: f"{value:.3g}" if value < 99.5 else f"{value:.0f}")
        )
        line += [_mean_text([cell.memory for cell in row], bytes_text)] if with_memory else []
        lines.append(line)
    columns = overview_columns([(backbone, dataset) for dataset in datasets])[: len(datasets) + bool(averages)]
    shown = [
        [escape_latex(label), "--", "--", *(_published(text) for text in line), "--", *["--"] * with_memory]
        for label, line in published_rows(published, columns)
    ]
    incomplete = any(cell.mean is not None and not cell.complete for cell in cells)
    several = len(datasets) > 1
    caption = (
        f"{escape_latex(title)}, {escape_latex(backbone)}: {_measured(cells)} in per cent, mean and sample standard "
        "deviation over seeds. Params: trained parameters without the head. Time: of training, per run."
        + (" Memory: most GPU memory of training." if with_memory else "")
        + (" Parameters, time and memory are means over the datasets." if several else "")
        + (f" {INCOMPLETE}: not all seeds." if incomplete else "")
        + (f" {escape_latex(published_note(published))}" if shown else "")
    )
    return _environment(lines[0], lines[1:], shown, caption, _slug(f"{title}-{backbone}"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _environment(
    header: Sequence[str], lines: Sequence[Sequence[str]], shown: Sequence[Sequence[str]], caption: str, slug: str
) -> str:
    """A `table`; shown: published rows, below a rule of their own."""
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            r"\footnotesize",
            *([r"\setlength{\tabcolsep}{3pt}"] if len(header) > 10 else []),
            f"\\caption{{{caption}}}",
            f"\\label{{tab:{slug}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            f"{' & '.join(header)} \\\\",
            r"\midrule",
            *(f"{' & '.join(line)} \\\\" for line in lines),
            *([r"\midrule", *(f"{' & '.join(line)} \\\\" for line in shown)] if shown else []),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _transfer_table(title: str, found: TransferTable) -> str:
    """Novel classes or other datasets, with published rows below."""
    best = [None if value is None else f"{100 * value:.1f}" for value in found.best()]
    lines = [
        [escape_latex(label), *(_score(score, top) for score, top in zip(row, best, strict=True))]
        for label, row in found.body.items()
    ]
    shown = [[escape_latex(name), *map(_published, texts)] for name, texts in found.published]
    caption = (
        f"{escape_latex(title)}. {escape_latex(found.title)}, top-1 accuracy in per cent. {escape_latex(found.note)}"
    )
    return _environment(
        ["Method", *map(escape_latex, found.header)], lines, shown, caption, _slug(f"{title}-{found.title}")
    )


def _score(score: Score, best: str | None) -> str:
    spread = "" if score.value is None or score.spread is None else f"_{{\\pm {100 * score.spread:.1f}}}$"
    return _number(score.value, best).removesuffix("$" if spread else "") + spread


def _published(text: str) -> str:
    return "--" if text == "-" else f"${text}$"


def _measured(cells: Sequence[Cell]) -> str:
    return measured_text(cells).replace("top-1", "top-1 accuracy")


def _best(values: Sequence[float | None]) -> str | None:
    """The highest as it is printed, so that what looks equal is marked alike."""
    known = [value for value in values if value is not None]
    return f"{100 * max(known):.1f}" if known else None


def _number(value: float | None, best: str | None) -> str:
    if value is None:
        return "--"
    text = f"{100 * value:.1f}"
    return f"$\\mathbf{{{text}}}$" if text == best else f"${text}$"


def _accuracy(cell: Cell, best: str | None) -> str:
    if cell.mean is None:
        return "failed" if cell.failures and not cell.left else "--"
    spread = "" if cell.std is None else f"_{{\\pm {100 * cell.std:.1f}}}"
    return _number(cell.mean, best).removesuffix("$") + f"{spread}$" + ("" if cell.complete else INCOMPLETE)


def _mean_count(values: Sequence[int | None]) -> str:
    return _mean_text(values, lambda value: f"{round(value):,}")


def _mean_text(values, text) -> str:
    known = [value for value in values if value is not None]
    return text(statistics.fmean(known)) if known else "--"
