"""Which experts blocks and classes use, as two heat maps and a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.lifecycle.atomic import write_text
from deltalens.methods.expert_use import ExpertUse
from deltalens.studies.figure import check_kind, new_figure, page_colours, save_figure

MOST_NUMBERS = 16  # columns up to which shares are written into the cells
MOST_NAMES = 60  # rows up to which each has its name


def to_csv(use: ExpertUse, class_names: Sequence[str]) -> str:
    """A row for each block and expert, and each class, pool and expert: counts of sub-tokens, shares as fractions."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["of", "name", "pool", "expert", "sub_tokens", "share"])
    for name, pool, counts, shares in zip(use.blocks, use.pools, use.by_block, use.of_blocks(), strict=True):
        for expert, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True)):
            table.writerow(["block", name, pool, expert, int(count), f"{share:.6f}"])
    for pool in sorted(set(use.pools)) if use.by_class is not None else ():
        shares_of_classes = use.of_classes(pool)
        for name, counts, shares in zip(class_names, use.by_class[:, pool], shares_of_classes, strict=True):
            for expert, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True)):
                table.writerow(["class", name, pool, expert, int(count), f"{share:.6f}"])
    return text.getvalue()


def plot_experts(use: ExpertUse, class_names: Sequence[str], title: str, path: str | os.PathLike) -> None:
    """Blocks and classes down, experts across; the colour is the share of a row's sub-tokens, an equal share is marked
    on the bar. With several pools the experts of each stand side by side in the map of classes. Classes without images
    are left out."""
    pools, experts = sorted(set(use.pools)), use.by_block.shape[1]
    by_block = use.of_blocks().numpy()
    maps = [("blocks", use.blocks, by_block, range(experts))]
    if use.by_class is not None:
        seen = np.flatnonzero(use.by_class.sum((1, 2)).numpy())
        of_classes = np.concatenate([use.of_classes(pool).numpy() for pool in pools], 1)[seen]
        names = [f"{pool}.{k}" if len(pools) > 1 else str(k) for pool in pools for k in range(experts)]
        maps.append(("classes", [class_names[i] for i in seen], of_classes, names))
    rows, columns = max(len(each[1]) for each in maps), max(each[2].shape[1] for each in maps)
    panel = (max(3.6, 1.6 + 0.3 * min(columns, 40)), max(2.6, 1.0 + 0.24 * min(rows, MOST_NAMES)))
    over_each_other = columns > MOST_NUMBERS
    figure, axes = new_figure(*((len(maps), 1) if over_each_other else (1, len(maps))), panel)
    top = max(float(each[2].max()) for each in maps)
    dead = use.dead()
    for axis, (what, names, shares, numbers) in zip(axes, maps, strict=True):
        picture = _heat_map(axis, shares, names, [str(number) for number in numbers], top)
        axis.set_title(f"{what}, shares of sub-tokens in %")
        axis.set_xlabel("expert" if len(pools) == 1 or what == "blocks" else "pool.expert")
        _mark_dead(axis, what, dead, len(pools), experts)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02)
    bar.ax.axhline(1 / experts, color=page_colours()["ink"], linewidth=1.2)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    figure.suptitle(title, fontsize=11, color=page_colours()["ink"])
    save_figure(figure, path)


def _heat_map(axis: Any, shares: np.ndarray, names: Sequence[str], columns: Sequence[str], top: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = page_colours()
    scale = LinearSegmentedColormap.from_list("shares", ["#ffffff", colours["c1"]])
    picture = axis.imshow(shares, aspect="auto", cmap=scale, vmin=0, vmax=top, interpolation="nearest")
    step = -(-len(names) // MOST_NAMES)
    axis.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    step = -(-len(columns) // 40)
    axis.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8, rotation=90 if len(columns) > 16 else 0)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    if len(columns) <= MOST_NUMBERS and len(names) <= MOST_NAMES:
        for row, column in np.ndindex(*shares.shape):
            colour = "white" if shares[row, column] > 0.6 * top else colours["ink"]
            axis.text(
                column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
    return picture


def _mark_dead(axis: Any, what: str, dead: dict[int, list[int]], pools: int, experts: int) -> None:
    """Numbers of dead experts are bold and red; in the map of blocks only where there is one pool."""
    if what == "blocks" and pools > 1:
        return
    wanted = {str(k) if pools == 1 else f"{pool}.{k}" for pool, ks in dead.items() for k in ks}
    for label in axis.get_xticklabels():
        if label.get_text() in wanted:
            label.set(color="#c0392b", fontweight="bold")


def write_experts(use: ExpertUse, class_names: Sequence[str], title: str, path: str | os.PathLike) -> Path:
    """The figure, and a CSV file beside it. Returns the path of the latter."""
    check_kind(path)
    file = Path(path).with_suffix(".csv")
    plot_experts(use, class_names, title, path)
    write_text(file, to_csv(use, class_names))
    return file
