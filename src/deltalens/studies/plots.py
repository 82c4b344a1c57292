"""Plots as inline SVG that takes its colours from the page, so that it follows a light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from deltalens.studies.labels import LINE_HEIGHT, Box, place_labels, spread, text_width

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46
COLOURS = 8  # the page defines classes c0 to c7
Mark = tuple[float, str]  # where on an axis, and what is written there
MOST_DOTS = 25  # epochs up to which a curve shows each of them


@dataclass(frozen=True)
class Point:
    """x > 0; y as a fraction; spread: one standard deviation of y, or None. number: of its method, which gives the
    colour; None for the place among the points."""

    label: str
    x: float
    y: float
    spread: float | None = None
    number: int | None = None


@dataclass(frozen=True)
class Line:
    """(x, y, spread or None) in the order of x. number: gives the colour."""

    label: str
    points: Sequence[tuple[float, float, float | None]]
    number: int


@dataclass(frozen=True)
class Curve:
    """One value for each epoch, from epoch 1. number: of its method, which gives the colour. band: one standard
    deviation for each epoch, or None."""

    label: str
    values: Sequence[float]
    number: int
    band: Sequence[float] | None = None


def scatter(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    size: tuple[int, int] = (WIDTH, HEIGHT),
    to_hundred: bool = True,
) -> str:
    """Points over a logarithmic x axis, y in per cent, each with its label. x_text: how a value of x is written.
    to_hundred: the y axis ends at 100 %, however low the points are."""
    values = [p.y - (p.spread or 0) for p in points] + [p.y + (p.spread or 0) for p in points]
    y_low, y_high, y_ticks = _percent_axis(values) if to_hundred else close_axis(values, 0.0, 1.0)
    x_low, x_high, x_ticks = log_axis([p.x for p in points])
    frame = Box(LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM)

    def place(point: Point) -> tuple[float, float]:
        share = (math.log10(point.x) - math.log10(x_low)) / (math.log10(x_high) - math.log10(x_low))
        return frame.left + share * (frame.right - frame.left), height_of(point.y, y_low, y_high, frame)

    x_marks = [(place(Point("", tick, y_low))[0], x_text(tick)) for tick in x_ticks]
    parts = [
        draw_axes(
            frame, x_marks, [(height_of(t, y_low, y_high, frame), f"{100 * t:.4g}") for t in y_ticks], x_title, y_title
        )
    ]
    places = [place(point) for point in points]
    numbers = [index if point.number is None else point.number for index, point in enumerate(points)]
    for number, point, (x, y) in zip(numbers, points, places, strict=True):
        if point.spread:
            top, bottom = (height_of(point.y + s * point.spread, y_low, y_high, frame) for s in (1, -1))
            parts.append(f'<path class="{colour(number)} line" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(draw_dot(x, y, number, 5, f"{point.label}: {x_text(point.x)}, {100 * point.y:.1f} %"))
    boxes = place_labels(places, [p.label for p in points], frame)
    for number, box, point, place_of_dot in zip(numbers, boxes, points, places, strict=True):
        parts += draw_label(box, point.label, place_of_dot, number)
    said = "; ".join(f"{p.label} {100 * p.y:.1f} %" for p in points)
    return whole_svg(parts, f"{y_title} against {x_title}: {said}", size)


def lines(
    series: Sequence[Line],
    x_title: str,
    y_title: str,
    as_percent: bool,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    logarithmic: bool | None = None,
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Lines over any x, each named at its end, with one standard deviation as a bar. as_percent: y are fractions;
    otherwise the y axis begins at 0. logarithmic: the x axis; None where x is positive and spans a factor of 20.
    x_text: how a value of x is written."""
    values = [y + sign * (deviation or 0) for line in series for _, y, deviation in line.points for sign in (1, -1)]
    y_low, y_high, y_ticks = close_axis(values, 0.0, 1.0) if as_percent else _axis_from_zero(values)
    xs = sorted({x for line in series for x, _, _ in line.points})
    if logarithmic is None:
        logarithmic = xs[0] > 0 and xs[-1] / xs[0] >= 20
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    room = max(text_width(line.label) for line in series) + 22
    frame = Box(LEFT, TOP, size[0] - room, size[1] - BOTTOM)

    def across(x: float) -> float:
        span = scale(xs[-1]) - scale(xs[0])
        return frame.left + 10 + (scale(x) - scale(xs[0])) / (span or 1.0) * (frame.right - frame.left - 20)

    x_marks: list[Mark] = []
    for x in xs:
        if not x_marks or across(x) - x_marks[-1][0] > text_width(x_text(x)) + 4:
            x_marks.append((across(x), x_text(x)))
    y_marks = [(height_of(t, y_low, y_high, frame), f"{100 * t:.4g}" if as_percent else f"{t:g}") for t in y_ticks]
    parts, ends = [draw_axes(frame, x_marks, y_marks, x_title, y_title)], []
    for line in series:
        path = [(across(x), height_of(y, y_low, y_high, frame)) for x, y, _ in line.points]
        ends.append(path[-1])
        parts.append(f'<path class="{colour(line.number)} line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in path)}"/>')
        for (x, y, deviation), (left, _) in zip(line.points, path, strict=True):
            if deviation:
                top, bottom = (height_of(y + sign * deviation, y_low, y_high, frame) for sign in (1, -1))
                parts.append(f'<path class="{colour(line.number)} line" d="M{left:.1f} {top:.1f}V{bottom:.1f}"/>')
            shown = f"{100 * y:.1f} %" if as_percent else f"{y:.3g}"
            parts.append(
                draw_dot(
                    left, height_of(y, y_low, y_high, frame), line.number, 3.5, f"{line.label}, {x_text(x)}: {shown}"
                )
            )
    parts += _names(series, ends, frame)
    said = "; ".join(f"{line.label} ends at {line.points[-1][1]:.3g}" for line in series)
    return whole_svg(parts, f"{y_title} against {x_title}: {said}", size)


def curves(series: Sequence[Curve], y_title: str, as_percent: bool, to_hundred: bool = True) -> str:
    """One line per method over epochs, named at its end, with its band. as_percent: values are fractions, shown from
    their low to 100 %, or to their highest without to_hundred; otherwise the axis begins at 0."""
    values = [value for curve in series for value in curve.values]
    values += [
        v + s * d for curve in series for v, d in zip(curve.values, curve.band or (), strict=False) for s in (1, -1)
    ]
    if as_percent:
        y_low, y_high, y_ticks = _percent_axis(values) if to_hundred else close_axis(values, 0.0, 1.0)
    else:
        y_low, y_high, y_ticks = _axis_from_zero(values)
    epochs = max(len(curve.values) for curve in series)
    room = max(text_width(curve.label) for curve in series) + 22
    frame = Box(LEFT, TOP, WIDTH - room, HEIGHT - BOTTOM)

    def across(epoch: int) -> float:
        return frame.left + (epoch - 1) / max(1, epochs - 1) * (frame.right - frame.left)

    step = max(1, math.ceil(epochs / 8))
    x_marks = [(across(e), str(e)) for e in range(1, epochs + 1) if e == 1 or e % step == 0]
    y_marks = [(height_of(t, y_low, y_high, frame), f"{100 * t:.0f}" if as_percent else f"{t:g}") for t in y_ticks]
    parts = [draw_axes(frame, x_marks, y_marks, "epoch", y_title)]
    ends = []
    for curve in series:
        if curve.band is not None:
            sides = [
                [
                    (across(e), height_of(min(max(v + sign * d, y_low), y_high), y_low, y_high, frame))
                    for e, (v, d) in enumerate(zip(curve.values, curve.band, strict=True), 1)
                ]
                for sign in (1, -1)
            ]
            outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in sides[0] + sides[1][::-1])
            parts.append(f'<path class="{colour(curve.number)} band" d="M{outline}Z"/>')
    for curve in series:
        path = [(across(e), height_of(min(v, y_high), y_low, y_high, frame)) for e, v in enumerate(curve.values, 1)]
        ends.append(path[-1])
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in path)
        parts.append(f'<path class="{colour(curve.number)} line" d="{d}"/>')
        dots = enumerate(zip(path, curve.values, strict=True), 1) if len(path) <= MOST_DOTS else []
        for epoch, ((x, y), value) in dots:
            tip = f"{curve.label}, epoch {epoch}: " + (f"{100 * value:.1f} %" if as_percent else f"{value:.3f}")
            parts.append(draw_dot(x, y, curve.number, 2.4, tip))
    parts += _names(series, ends, frame)
    return whole_svg(
        parts, f"{y_title} by epoch: " + "; ".join(f"{c.label} ends at {c.values[-1]:.3g}" for c in series)
    )


def colour(number: int) -> str:
    """The page's class for the colour of the number-th method."""
    return f"c{number % COLOURS}"


def _names(series: Sequence[Curve | Line], ends: Sequence[tuple[float, float]], frame: Box) -> list[str]:
    """The name of each line beside its end, moved apart where ends are close."""
    parts = []
    heights = spread([y for _, y in ends], LINE_HEIGHT, frame.top + 4, frame.bottom - 4)
    for line, (x, y), height in zip(series, ends, heights, strict=True):
        left = frame.right + 14
        parts.append(f'<path class="leader" d="M{x + 4:.1f} {y:.1f}L{left - 3:.1f} {height:.1f}"/>')
        parts.append(draw_text(left, height, line.label, f"{colour(line.number)} name", "start"))
    return parts


# ------------------------------------------------------------------ axes
def log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of a logarithmic axis with some room at both ends; ValueError for values that are not
    positive."""
    if min(values) <= 0:
        raise ValueError(f"a logarithmic axis needs positive values, got {min(values)}")
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.12 * (high - low), 0.15)
    low, high = 10 ** (low - room), 10 ** (high + room)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return low, high, ticks


def _percent_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """From a round number below the lowest value to 1."""
    low = min(values)
    for step in (0.02, 0.05, 0.1, 0.2):
        start = max(0.0, math.floor((low - 0.15 * (1 - low)) / step) * step)
        if (1 - start) / step <= 6.01:
            break
    ticks = [start + step * k for k in range(round((1 - start) / step) + 1)]
    return start, 1.0 + 0.02 * (1 - start), ticks


def close_axis(values: Sequence[float], least: float, most: float) -> tuple[float, float, list[float]]:
    """Between round numbers just beyond the values, within [least, most], with 4 to 7 ticks."""
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.005)
    low, high = max(least, low - room), min(most, high + room)
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [step * k for k in range(first, last + 1)]


def _axis_from_zero(values: Sequence[float]) -> tuple[float, float, list[float]]:
    finite = sorted(value for value in values if math.isfinite(value))
    high = 1.05 * (finite[-1] if finite and finite[-1] > 0 else 1.0)
    step = 10 ** math.floor(math.log10(high / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if high / (step * factor) <= 6)
    return 0.0, high, [step * k for k in range(math.floor(high / step) + 1)]


def height_of(value: float, low: float, high: float, frame: Box) -> float:
    return frame.bottom - (value - low) / (high - low) * (frame.bottom - frame.top)


def draw_axes(frame: Box, x_marks: Sequence[Mark], y_marks: Sequence[Mark], x_title: str, y_title: str) -> str:
    parts = []
    for y, text in y_marks:
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{escape(text)}</text>'
        )
    for x, text in x_marks:
        parts.append(f'<path class="grid" d="M{x:.1f} {frame.bottom}v5"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 18}" text-anchor="middle">{escape(text)}</text>'
        )
    middle_x, middle_y = frame.middle
    parts.append(f'<path class="axis" d="M{frame.left} {frame.bottom}H{frame.right:.1f}"/>')
    title_y = frame.bottom + BOTTOM - 8
    parts.append(
        f'<text class="axis-title" x="{middle_x:.1f}" y="{title_y:g}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<g transform="translate(9 {middle_y:.1f}) rotate(-90)">{draw_text(0, 0, y_title, "axis-title", "middle")}</g>'
    )
    return "".join(parts)


def draw_label(box: Box, text: str, point: tuple[float, float], number: int) -> list[str]:
    middle, y = box.middle
    if box.left > point[0]:
        x, anchor = box.left, "start"
    elif box.right < point[0]:
        x, anchor = box.right, "end"
    else:
        x, anchor = middle, "middle"
    nearest_x = min(max(point[0], box.left), box.right)
    nearest_y = min(max(point[1], box.top + 3), box.bottom - 3)
    parts = []
    if math.hypot(nearest_x - point[0], nearest_y - point[1]) > 16:
        parts.append(f'<path class="leader" d="M{point[0]:.1f} {point[1]:.1f}L{nearest_x:.1f} {nearest_y:.1f}"/>')
    parts.append(draw_text(x, y, text, f"{colour(number)} name", anchor))
    return parts


def whole_svg(parts: Sequence[str], description: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    label = escape(description, quote=True)
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def draw_text(x: float, y: float, text: str, classes: str, anchor: str) -> str:
    """One line of text, centred on y."""
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}">{escape(text)}</text>'


def draw_dot(x: float, y: float, number: int, radius: float, tip: str) -> str:
    """A mark with a tip. Where there are more methods than colours, the form tells those of one colour apart."""
    classes, inside = f'class="{colour(number)} dot"', f"<title>{escape(tip)}</title>"
    form = number // COLOURS % 3
    if form == 0:
        return f'<circle {classes} cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inside}</circle>'
    r = 0.95 * radius if form == 1 else 1.25 * radius
    corners = ((-r, -r), (r, -r), (r, r), (-r, r)) if form == 1 else ((0, -r), (0.9 * r, 0.7 * r), (-0.9 * r, 0.7 * r))
    path = "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners)
    return f'<path {classes} d="M{path}Z">{inside}</path>'
