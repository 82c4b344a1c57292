"""Where the words of a plot go, so that none covers another or a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FONT_SIZE = 14  # the largest that the page uses for names
LINE_HEIGHT = 16
MEAN_CHARACTER = 0.64 * FONT_SIZE  # bold, in a wide font
DOT = 7.0  # half the edge of the square kept free around a point

# right, left, above, below first: what people read most easily
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 67, 293, 113, 247)
_DISTANCES = (10, 20, 32, 46, 62, 80, 100, 125, 155, 190)


class Box(NamedTuple):
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def overlap(self, other: Box) -> float:
        """The area two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: Box) -> bool:
        return self.left < frame.left or self.top < frame.top or self.right > frame.right or self.bottom > frame.bottom


def text_width(text: str) -> float:
    """About how wide a text is; generous for words and numbers."""
    return MEAN_CHARACTER * len(text)


def short_name(text: str, most: int = 24) -> str:
    """A name for a plot, cut in its middle where it is longer: both ends tell names apart."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - most // 2 - 1) :]}"


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box, kept_free: Sequence[Box] = ()
) -> list[Box]:
    """A box for each text, near its point, inside the frame, free of all points and of the other texts. kept_free: what
    else is not to be covered.

    Where a crowded plot leaves no free place, the one that covers least is taken.
    """
    dots = [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in points]
    dots += kept_free
    placed: list[Box] = []
    for (x, y), text in zip(points, texts, strict=True):
        taken = [*dots, *placed]
        placed.append(_least_covering(list(_candidates(x, y, text_width(text))), taken, frame))
    return placed


def _least_covering(candidates: Sequence[Box], taken: Sequence[Box], frame: Box) -> Box:
    """The first box that covers nothing; where there is none, the one that covers least, outside the frame last."""
    best, least = candidates[0], math.inf
    for box in candidates:
        covered = sum(box.overlap(other) for other in taken) + (1e6 if box.outside(frame) else 0.0)
        if covered < least:
            best, least = box, covered
        if covered == 0:
            break
    return best


def _candidates(x: float, y: float, width: float) -> Iterator[Box]:
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
            middle_x = x + dx * distance + _side(dx) * width / 2
            middle_y = y + dy * distance + _side(dy) * LINE_HEIGHT / 2
            top = middle_y - LINE_HEIGHT / 2
            yield Box(middle_x - width / 2, top, middle_x + width / 2, top + LINE_HEIGHT)


def _side(direction: float) -> float:
    """-1, 0 or 1: which side of the point the box lies on; 0 keeps it centred."""
    return 0.0 if abs(direction) < 0.2 else math.copysign(1.0, direction)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions as little as needed so that neighbours are `gap` apart and all lie in [low, high], in the same
    order.

    Where there is not room for all, the gap shrinks.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    moved = [min(max(positions[i], low), high) for i in order]
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + gap)
    moved[-1] = min(moved[-1], high)
    for k in range(len(moved) - 2, -1, -1):
        moved[k] = min(moved[k], moved[k + 1] - gap)
    result = [0.0] * len(positions)
    for k, i in enumerate(order):
        result[i] = moved[k]
    return result
