"""Plots that set methods against each other: one task against another, and mean ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltalens.studies.labels import LINE_HEIGHT, Box, place_labels, text_width
from deltalens.studies.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    close_axis,
    colour,
    draw_axes,
    draw_dot,
    draw_label,
    draw_text,
    height_of,
    whole_svg,
)

ROW = 30


@dataclass(frozen=True)
class TwoTasks:
    """One method's accuracies on two tasks, fractions, with one standard deviation each or None. number: of its method,
    which gives the colour. lines: it is drawn as a dashed line across each axis too."""

    label: str
    x: float
    y: float
    x_spread: float | None
    y_spread: float | None
    number: int
    lines: bool = False


@dataclass(frozen=True)
class RankRow:
    """A method's mean rank, its standard deviation or None, and the rank in each task."""

    label: str
    mean: float
    std: float | None
    ranks: Sequence[float]
    number: int


def task_scatter(points: Sequence[TwoTasks], x_title: str, y_title: str) -> str:
    """A point for each method, one task per axis, both in per cent; up and to the right is better."""
    frame = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    x_low, x_high, x_ticks = close_axis([p.x + s * (p.x_spread or 0) for p in points for s in (1, -1)], 0.0, 1.0)
    y_low, y_high, y_ticks = close_axis([p.y + s * (p.y_spread or 0) for p in points for s in (1, -1)], 0.0, 1.0)

    def across(value: float) -> float:
        return frame.left + (value - x_low) / (x_high - x_low) * (frame.right - frame.left)

    def up(value: float) -> float:
        return height_of(value, y_low, y_high, frame)

    x_marks = [(across(tick), f"{100 * tick:.4g}") for tick in x_ticks]
    y_marks = [(up(tick), f"{100 * tick:.4g}") for tick in y_ticks]
    parts, drawn = [draw_axes(frame, x_marks, y_marks, x_title, y_title)], []
    for p in points:
        x, y, kind = across(p.x), up(p.y), colour(p.number)
        if p.lines:
            path = f"M{frame.left} {y:.1f}H{frame.right:.1f}M{x:.1f} {frame.top}V{frame.bottom}"
            parts.append(f'<path class="{kind} reference" d="{path}"/>')
            drawn += [Box(frame.left, y - 1, frame.right, y + 1), Box(x - 1, frame.top, x + 1, frame.bottom)]
        if p.x_spread:
            left, right = across(max(x_low, p.x - p.x_spread)), across(min(x_high, p.x + p.x_spread))
            parts.append(f'<path class="{kind} line" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            drawn.append(Box(left, y - 2, right, y + 2))
        if p.y_spread:
            top, bottom = up(min(y_high, p.y + p.y_spread)), up(max(y_low, p.y - p.y_spread))
            parts.append(f'<path class="{kind} line" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
            drawn.append(Box(x - 2, top, x + 2, bottom))
        parts.append(draw_dot(x, y, p.number, 5, f"{p.label}: {100 * p.x:.1f} %, {100 * p.y:.1f} %"))
    places = [(across(p.x), up(p.y)) for p in points]
    boxes = place_labels(places, [p.label for p in points], frame, drawn)
    for p, box, place in zip(points, boxes, places, strict=True):
        parts += draw_label(box, p.label, place, p.number)
    said = "; ".join(f"{p.label} {100 * p.x:.1f} and {100 * p.y:.1f} %" for p in points)
    return whole_svg(parts, f"{y_title} against {x_title}: {said}")


def rank_plot(rows: Sequence[RankRow], distance: float | None = None, size_across: int = WIDTH) -> str:
    """A row for each method, best first: mean rank with one standard deviation, and a stroke for each task's rank.

    distance: mean ranks further apart differ; drawn as a bar of that length.
    """
    count = len(rows)
    room = max(text_width(row.label) for row in rows) + 16
    top = TOP + (26 if distance else 0)
    frame = Box(min(room, size_across / 2), top, size_across - 46, top + ROW * count)

    def across(rank: float) -> float:
        return frame.left + 12 + (rank - 1) / max(1, count - 1) * (frame.right - frame.left - 24)

    step = 1 if count <= 12 else 2
    marks = [(across(rank), str(rank)) for rank in range(1, count + 1, step)]
    parts = [draw_axes(frame, marks, [], "mean rank over tasks, 1 is best", "")]
    for index, row in enumerate(rows):
        y, kind = frame.top + ROW * (index + 0.5), colour(row.number)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        strokes = "".join(f"M{across(rank):.1f} {y - 6:.1f}v12" for rank in sorted(set(row.ranks)))
        parts.append(f'<path class="{kind} each" d="{strokes}"/>')
        if row.std:
            left, right = across(max(1.0, row.mean - row.std)), across(min(float(count), row.mean + row.std))
            parts.append(f'<path class="{kind} line" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        spread = "" if row.std is None else f" ± {row.std:.2f}"
        parts.append(draw_dot(across(row.mean), y, row.number, 6, f"{row.label}: mean rank {row.mean:.2f}{spread}"))
        parts.append(draw_text(frame.left - 10, y, row.label, f"{kind} name", "end"))
        parts.append(draw_text(frame.right + 10, y, f"{row.mean:.2f}", "tick", "start"))
    if distance:
        y = TOP + LINE_HEIGHT / 2
        length = across(1 + min(distance, count - 1)) - across(1)
        start = frame.left + 12
        parts.append(f'<path class="axis" d="M{start:.1f} {y - 4:.1f}v8M{start:.1f} {y:.1f}h{length:.1f}m0 -4v8"/>')
        parts.append(draw_text(start + length + 8, y, f"critical distance {distance:.2f}", "tick", "start"))
    said = "; ".join(f"{row.label} {row.mean:.2f}" for row in rows)
    return whole_svg(parts, f"mean ranks: {said}", (size_across, round(frame.bottom) + BOTTOM))
