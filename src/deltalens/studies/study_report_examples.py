"""The report's pictures: test images, each with what every method says about it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from deltalens.studies.examples import Example, Examples
from deltalens.studies.report import said_line
from deltalens.studies.significance import tasks_of
from deltalens.studies.study_report_plots import MOST_TASKS
from deltalens.studies.study_table import StudyTable

PARTS = {"test": "test", "val": "validation"}
Cells = Mapping[tuple[str, str, str], Examples]


def example_sections(table: StudyTable, examples: Cells, pictures: Mapping[tuple[str, int], Path]) -> list[str]:
    """One part of the page for every task, with the methods that have examples; folded up where there are many.

    examples: (backbone, dataset, method) -> those of its first seed. pictures: (dataset, number of the image) -> file.
    """
    tasks = tasks_of(table.cells)
    methods = dict.fromkeys(cell.variant.label for cell in table.cells)
    sections = []
    for task in tasks:
        said = {label: examples[(*task, label)] for label in methods if (*task, label) in examples}
        if said:
            title, note, cards = escape(", ".join(task)), _note(said), _cards(said, task[1], pictures)
            content = f'<p class="note">{escape(note)}</p>\n<div class="pictures">\n{cards}\n</div>'
            if len(tasks) > MOST_TASKS:
                content = f"<details><summary>{title}</summary>\n{content}\n</details>"
            sections.append(f"<section>\n<h2>Example pictures: {title}</h2>\n{content}\n</section>")
    return sections


def _note(said: Mapping[str, Examples]) -> str:
    first = next(iter(said.values()))
    part = PARTS[first.part]
    how = "all of them" if len(first.shown) == first.images else "evenly spaced in their order"
    return (
        f"{len(first.shown)} of {first.images:,} {part} samples, {how}, so that no answer decides which are shown. "
        "Each with the true class, and what the adapter of the first seed says, with its probability."
    )


def _cards(said: Mapping[str, Examples], dataset: str, pictures: Mapping[tuple[str, int], Path]) -> str:
    cards = []
    for example in next(iter(said.values())).shown:
        lines = [
            _line(label, own)
            for label, examples in said.items()
            for own in examples.shown
            if own.index == example.index
        ]
        name = escape(", ".join(example.true) or "none", quote=True)
        file = pictures.get((dataset, example.index))
        image = "" if file is None else f'<img src="{_data_url(file)}" alt="example of class {name}">'
        said_of_it = f'<div class="said"><h3>{name}</h3><ul>{"".join(lines)}</ul></div>'
        cards.append(f'<article class="picture">{image}{said_of_it}</article>')
    return "\n".join(cards)


def _line(label: str, example: Example) -> str:
    if len(example.said) == 1:
        ((name, confidence),) = example.said
        return said_line(label, name, f"{100 * confidence:.0f} %", example.right)
    names = ", ".join(f"{name} {100 * confidence:.0f} %" for name, confidence in example.said)
    return said_line(label, names or "none", "", example.right)


def _data_url(file: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode()
