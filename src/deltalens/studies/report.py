"""A comparison as one HTML page that needs nothing else: no network, no scripts, pictures and plots inside."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.plots import Curve, Point, colour, curves, scatter
from deltalens.studies.results import (
    ACCURACY,
    Comparison,
    Picture,
    Prediction,
    RunResult,
    bytes_text,
    count_text,
    percent_text,
    seconds_text,
    settings_text,
)

STYLE = Path(__file__).with_name("report.css")
NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
COLUMNS = (
    "Trained parameters",
    "with head",
    "% of backbone",
    "Training time",
    "Saved for backward",
    "Adapter file",
)
SMALLEST_PICTURE = 128  # edge in pixels below which a picture is enlarged, so that browsers do not blur it


def write_report(comparison: Comparison, path: str | os.PathLike, answers: str = "") -> None:
    """Write the page: table, accuracy against parameters and memory, training curves, example predictions, what was
    run. answers: a further section, as HTML."""
    write_text(path, render_report(comparison, answers))


def render_report(comparison: Comparison, answers: str = "") -> str:
    """The page as text. Raises ValueError for a comparison without runs."""
    if not comparison.runs:
        raise ValueError("a report needs at least one run")
    sections = [head(comparison.title, comparison.intro), _table(comparison), _plots(comparison)]
    sections += [_pictures(comparison)] if comparison.pictures else []
    sections += [answers]
    sections += [_adapters(comparison.runs), conditions_section(comparison.conditions)]
    return page(comparison.title, sections)


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(section for section in sections if section) + "\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------ sections
def head(title: str, intro: str) -> str:
    """Title and paragraphs, which blank lines separate."""
    paragraphs = [part.strip() for part in intro.split("\n\n") if part.strip()]
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n" + "\n".join(f"<p>{escape(p)}</p>" for p in paragraphs) + "\n</header>"
    )


def _table(comparison: Comparison) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in ("Method", f"Test {comparison.metric}", *COLUMNS))
    rows = "\n".join(_row(run, number, comparison.metric) for number, run in enumerate(comparison.runs))
    measured = f"{_capital(comparison.metric)} on {comparison.test_images:,} test {comparison.inputs}"
    if comparison.metric == ACCURACY:  # a share of independent images
        half_width = max(100 * accuracy_interval(run.accuracy, comparison.test_images) for run in comparison.runs)
        measured += f"; with that many, differences of less than about {half_width:.1f} points may be chance"
    return (
        "<section>\n<h2>Results</h2>\n"
        f'<p class="note">{escape(measured)}. Trained parameters and their share of the '
        "backbone are without the head, which every method trains. Saved for backward: activations that one training "
        "step keeps in memory.</p>\n"
        f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</section>"
    )


def _capital(text: str) -> str:
    """With a capital where the word has none of its own."""
    return text.capitalize() if text.islower() else text


def _row(run: RunResult, number: int, metric: str) -> str:
    deviation = "" if run.accuracy_std is None else f" ± {100 * run.accuracy_std:.1f}"
    bar = f'<span class="bar"><i style="width:{100 * run.accuracy:.1f}%"></i></span>'
    cells = (
        f"{run.adapter_parameters:,}",
        f"{run.trained_parameters:,}",
        f"{percent_text(run.percent)} %",
        seconds_text(run.seconds),
        bytes_text(run.saved_bytes),
        bytes_text(run.adapter_bytes),
    )
    return (
        f'<tr class="{colour(number)}"><td><span class="method">{escape(run.method)}</span>'
        f'<span class="settings">{escape(settings_text(run.settings))}</span></td>'
        f'<td class="accuracy" data-label="Test {escape(metric)}">{100 * run.accuracy:.1f}{deviation} %{bar}</td>'
        + "".join(f'<td data-label="{escape(label)}">{cell}</td>' for label, cell in zip(COLUMNS, cells, strict=True))
        + "</tr>"
    )


def _plots(comparison: Comparison) -> str:
    runs, metric = comparison.runs, comparison.metric
    figures = [
        (
            f"{_capital(metric)} against trained parameters",
            scatter(
                [Point(r.method, max(1, r.trained_parameters), r.accuracy, r.accuracy_std) for r in runs],
                "trained parameters, head included",
                f"test {metric}, %",
                count_text,
            ),
        ),
        (
            f"{_capital(metric)} against memory for training",
            scatter(
                [Point(r.method, max(1, r.saved_bytes), r.accuracy, r.accuracy_std) for r in runs],
                "activations saved for backward",
                f"test {metric}, %",
                bytes_text,
            ),
        ),
    ]
    trained = [(number, run) for number, run in enumerate(runs) if run.epochs]
    if trained:
        accuracy = [Curve(r.method, [e.val_accuracy for e in r.epochs], number) for number, r in trained]
        loss = [Curve(r.method, [e.train_loss for e in r.epochs], number) for number, r in trained]
        figures.append(
            (f"Validation {metric} during training", curves(accuracy, f"validation {metric}, %", as_percent=True))
        )
        figures.append(("Training loss", curves(loss, "mean loss of the epoch", as_percent=False)))
    return plots_section(f"{_capital(metric)}, cost and training", figures)


def plots_section(title: str, figures: Iterable[tuple[str, str]]) -> str:
    """Plots side by side: (caption, SVG)."""
    drawn = "\n".join(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in figures)
    return f'<section>\n<h2>{escape(title)}</h2>\n<div class="plots">\n{drawn}\n</div>\n</section>'


def _pictures(comparison: Comparison) -> str:
    answers = [(run.method, run.predictions) for run in comparison.runs]
    return pictures_section(
        "Example predictions", comparison.pictures_note, comparison.pictures, answers, comparison.inputs
    )


def pictures_section(
    title: str,
    note: str,
    pictures: Sequence[Picture],
    answers: Iterable[tuple[str, Sequence[Prediction]]],
    inputs: str = "images",
) -> str:
    """A card for each picture, with what each method says. answers: (method, a prediction for each picture).
    inputs: what is shown, "images" or "clouds"."""
    answers, cards = list(answers), []
    for number, picture in enumerate(pictures):
        name = escape(picture.true_name, quote=True)
        shown = f"test {inputs.removesuffix('s')} of class {name}"
        lines = "".join(_prediction(method, said[number], picture.true_name) for method, said in answers)
        cards.append(
            f'<article class="picture"><img src="{_data_url(picture)}" alt="{shown}">'
            f'<div class="said"><h3>{name}</h3><ul>{lines}</ul></div></article>'
        )
    said = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n{said}<div class="pictures">\n'
        + "\n".join(cards)
        + "\n</div>\n</section>"
    )


def _prediction(method: str, said: Prediction, true_name: str) -> str:
    return said_line(method, said.name, f"{100 * said.confidence:.0f} %", said.name == true_name)


def said_line(method: str, said: str, confidence: str, right: bool) -> str:
    """What a method says about a picture, as an item of the list below it."""
    mark, kind, word = ("✓", "right", "correct") if right else ("✗", "wrong", "wrong")
    return (
        f'<li class="{kind}"><span class="mark" title="{word}">{mark}</span>'
        f'<span class="by">{escape(method)}</span>'
        f'<b>{escape(said)}</b><span class="sure">{escape(confidence)}</span></li>'
    )


def _adapters(runs: Iterable[RunResult]) -> str:
    saved = [(run, run.folder) for run in runs if run.folder]
    if not saved:
        return ""
    best = max(saved, key=lambda pair: pair[0].accuracy)[1]
    folders = ", ".join(f"{escape(run.method)} in <code>{escape(folder)}</code>" for run, folder in saved)
    code = (
        "import deltalens as dl\n\n"
        "# backbone, adapter and head, ready to predict\n"
        f'model = dl.from_pretrained("{best}")\n'
        "dl.class_names(model), dl.preprocessing(model)"
    )
    return (
        f'<section>\n<h2>Use an adapter</h2>\n<p class="note">Beside this page lie the adapters: {folders}.</p>\n'
        f"<pre>{escape(code)}</pre>\n</section>"
    )


def conditions_section(conditions: Mapping[str, str]) -> str:
    """What was run, name by name; nothing for none."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in conditions.items())
    return f"<section>\n<h2>What was run</h2>\n<dl>\n{items}\n</dl>\n</section>" if items else ""


# ------------------------------------------------------------------ details
def accuracy_interval(accuracy: float, images: int) -> float:
    """Half the width of a 95 % interval for a share measured on so many images (Agresti and Coull's)."""
    share = (accuracy * images + 2) / (images + 4)
    return 1.96 * float(np.sqrt(share * (1 - share) / (images + 4)))


def _data_url(picture: Picture) -> str:
    from PIL import Image

    image = Image.fromarray(picture.image)
    edge = min(image.size)
    if edge < SMALLEST_PICTURE:
        scale = SMALLEST_PICTURE / edge
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if np.ptp(picture.image.reshape(*picture.image.shape[:2], -1), axis=2).max() == 0:
        image = image.convert("L")  # grey in three equal channels takes a third of the bytes
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
