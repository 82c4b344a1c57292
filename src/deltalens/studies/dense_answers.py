"""Several methods' answers to the same scenes, side by side, as a section of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape

from deltalens.studies.dense_measure import Found
from deltalens.studies.dense_pictures import drawn
from deltalens.studies.dense_report import data_url

EDGE = 400  # pixels of a picture's longer side
NOTE = "Test scenes, evenly spaced and not picked by hand: the truth, and what every method finds."
NOTE_OF_BOXES = " Boxes with a score of at least 0.5."


def answers_section(answers: Mapping[str, Sequence[Found]], class_names: Sequence[str]) -> str:
    """A group of pictures for each scene: the truth, then the answer of every method. answers: method -> what it finds
    in each scene, the same scenes for all, with the truth."""
    methods = list(answers)
    first = answers[methods[0]]
    groups = []
    for number, scene in enumerate(first):
        assert scene.true is not None
        shown = [("truth", scene.true), *((method, answers[method][number]) for method in methods)]
        groups.append("\n".join(_figure(os.path.basename(scene.name), said, each, class_names) for said, each in shown))
    note = NOTE + (NOTE_OF_BOXES if first and first[0].mask is None else "")
    body = "\n".join(f'<div class="plots answers">\n{group}\n</div>' for group in groups)
    return f'<section>\n<h2>Answers</h2>\n<p class="note">{escape(note)}</p>\n{body}\n</section>'


def _figure(scene: str, said: str, found: Found, class_names: Sequence[str]) -> str:
    source, alt = data_url(drawn(found, class_names), EDGE), escape(f"{scene}: {said}", quote=True)
    return (
        f'<figure><figcaption>{escape(said)}</figcaption><img src="{source}" alt="{alt}" style="width:100%"></figure>'
    )
