"""Which dataset each stage of a tower knows a sample to come from, as a figure, a CSV file and a table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deltalens.lifecycle.atomic import write_text
from deltalens.studies.figure import new_figure, page_colours, save_figure
from deltalens.studies.layer_features import EMBED
from deltalens.studies.recognition import StageAccuracy


def to_csv(found: Sequence[StageAccuracy], seeds: Sequence[int], datasets: int) -> str:
    """A row for each tower and stage: accuracies are fractions, std is empty for a single seed."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["tower", "stage", "mean", "std", *(f"seed_{s}" for s in seeds), "chance", "learnt", "held_out"])
    for each in found:
        std = "" if each.std is None else f"{each.std:.6f}"
        accuracies = [f"{value:.6f}" for value in each.accuracies]
        counts = [f"{1 / datasets:.6f}", each.learnt, each.held_out]
        table.writerow([each.tower, each.stage, f"{each.mean:.6f}", std, *accuracies, *counts])
    return text.getvalue()


def to_table(found: Sequence[StageAccuracy]) -> str:
    """Stages down, towers across, in per cent."""
    towers = list(dict.fromkeys(each.tower for each in found))
    cells = {(each.tower, each.stage): each for each in found}
    lines = ["stage  " + "".join(f"{tower + ', %':>16}" for tower in towers)]
    for stage in stages_in_order(found):
        texts = [_percent(cells[tower, stage]) if (tower, stage) in cells else "" for tower in towers]
        lines.append((f"{stage:<7}" + "".join(f"{text:>16}" for text in texts)).rstrip())
    return "\n".join(lines)


def _percent(each: StageAccuracy) -> str:
    return f"{100 * each.mean:.1f}" + ("" if each.std is None else f" ± {100 * each.std:.1f}")


def stages_in_order(found: Sequence[StageAccuracy]) -> list[str]:
    """The stages of all towers: embedding, blocks by number, what follows them."""
    names = list(dict.fromkeys(each.stage for each in found))
    blocks = sorted((name for name in names if name.isdigit()), key=int)
    return [*([EMBED] if EMBED in names else []), *blocks, *(n for n in names if n != EMBED and n not in blocks)]


def plot_recognition(
    found: Sequence[StageAccuracy], datasets: Sequence[str], title: str, path: str | os.PathLike[str]
) -> None:
    """Accuracy over the stages: a line for each tower, a band of one standard deviation, chance dashed. A tower with
    fewer blocks than the other has its last stage where the other has it."""
    figure, (axis,) = new_figure(1, 1, (6.4, 4.0))
    colours, order = page_colours(), stages_in_order(found)
    towers = list(dict.fromkeys(each.tower for each in found))
    for number, tower in enumerate(towers):
        own = [each for each in found if each.tower == tower]
        places, means = [order.index(each.stage) for each in own], np.array([100 * each.mean for each in own])
        colour = colours[f"c{1 + 2 * number}"]
        axis.plot(places, means, color=colour, marker="o", markersize=4, linewidth=1.8, label=_label(tower))
        if all(each.std is not None for each in own):
            std = np.array([100 * (each.std or 0) for each in own])
            low, high = np.clip(means - std, 0, 100), np.clip(means + std, 0, 100)
            axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    chance = 100 / len(datasets)
    axis.axhline(chance, color=colours["soft"], linestyle="--", linewidth=1.2, label=f"chance ({chance:.4g} %)")
    axis.set_ylim(0, 102)
    axis.grid(axis="y", color=colours["line"], linewidth=0.8)
    axis.set_axisbelow(True)
    step = -(-len(order) // 16)
    ends = (EMBED, *(name for name in order if not name.isdigit()))
    shown = [i for i, name in enumerate(order) if name in ends or (int(name) - 1) % step == 0]
    axis.set_xticks(shown, [order[i] for i in shown])
    axis.set_xlabel("embedding, blocks, and what leaves the tower")
    axis.set_ylabel(f"which of {len(datasets)} datasets, accuracy in %")
    axis.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)


def _label(tower: str) -> str:
    return {"vision": "image tower", "text": "text tower"}.get(tower, tower)


def write_recognition(
    found: Sequence[StageAccuracy],
    datasets: Sequence[str],
    seeds: Sequence[int],
    title: str,
    path: str | os.PathLike[str],
) -> Path:
    """The figure, and a CSV file beside it. Returns the path of the latter."""
    file = Path(path).with_suffix(".csv")
    plot_recognition(found, datasets, title, path)
    write_text(file, to_csv(found, seeds, len(datasets)))
    return file
