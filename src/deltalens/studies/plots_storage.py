"""The plot of storage: a row for each method, bytes of 1, 10 and 100 tasks on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deltalens.studies.labels import LINE_HEIGHT, Box, short_name, text_width
from deltalens.studies.plots import (
    BOTTOM,
    TOP,
    WIDTH,
    colour,
    draw_axes,
    draw_dot,
    draw_text,
    log_axis,
    whole_svg,
)
from deltalens.studies.results import bytes_text
from deltalens.studies.storage import COUNTS, StorageRow

ROW = 28


def storage_plot(rows: Sequence[StorageRow], numbers: Mapping[str, int]) -> tuple[str, tuple[int, int]]:
    """(SVG, its size). A dot at the measured total, and a line with strokes at the computed totals of `COUNTS` tasks.
    Rows have a known backbone. numbers: of the methods, which give the colours."""
    totals = [[row.total_for(count) or 1.0 for count in COUNTS] for row in rows]
    low, high, ticks = log_axis([size for sizes in totals for size in sizes])
    room = max(text_width(short_name(row.method)) for row in rows) + 14
    frame = Box(min(room, WIDTH / 2), TOP + 24, WIDTH - 74, TOP + 24 + ROW * len(rows))

    def across(size: float) -> float:
        share = (math.log10(size) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return frame.left + share * (frame.right - frame.left)

    tasks = " / ".join(dict.fromkeys(str(row.tasks) for row in rows))
    measured = f"dot: {tasks} {'task' if tasks == '1' else 'tasks'}, measured"
    head = f"{measured}; strokes: {', '.join(map(str, COUNTS))} tasks, computed"
    parts = [draw_text(WIDTH / 2, TOP + LINE_HEIGHT / 2 - 4, head, "tick", "middle")]
    parts.append(draw_axes(frame, [(across(tick), bytes_text(tick)) for tick in ticks], [], "bytes on disk", ""))
    for index, (row, sizes) in enumerate(zip(rows, totals, strict=True)):
        y, number = frame.top + ROW * (index + 0.5), numbers[row.method]
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        strokes = "".join(f"M{across(size):.1f} {y - 6:.1f}v12" for size in sizes)
        path = f"M{across(sizes[0]):.1f} {y:.1f}H{across(sizes[-1]):.1f}{strokes}"
        parts.append(f'<path class="{colour(number)} line" d="{path}"/>')
        total = row.total or 1.0
        parts.append(draw_dot(across(total), y, number, 5.5, f"{row.method}: {row.tasks} tasks, {bytes_text(total)}"))
        parts.append(draw_text(frame.left - 10, y, short_name(row.method), f"{colour(number)} name", "end"))
        parts.append(draw_text(frame.right + 8, y, bytes_text(total), "tick", "start"))
    said = "; ".join(f"{row.method} {bytes_text(row.total or 0)}" for row in rows)
    size = (WIDTH, round(frame.bottom) + BOTTOM)
    return whole_svg(parts, f"bytes on disk: {said}", size), size
