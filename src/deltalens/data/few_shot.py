"""Few-shot sampling as CoOp and its successors do it, so that a seed means the same images as in their papers."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

MOST_VAL = 4


def few_shot(
    train: Sequence[int], val: Sequence[int] | None, shots: int, seed: int
) -> tuple[list[int], list[int] | None]:
    """(training positions, validation positions) of `shots` and min(shots, 4) items of every class.

    train, val: labels in the order of the published lists; val None draws none. From one stream, that of
    `random.seed(seed)`: `random.sample(items, shots)` for the classes of train in the order in which they first
    appear, then the same for val. A class with fewer items is taken whole, in its own order, and takes nothing from
    the stream. Sampling is over all classes; base and new classes are chosen afterwards.

    Raises ValueError for shots below 1.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    stream = Random(seed)
    chosen = _sample(train, shots, stream)
    return chosen, None if val is None else _sample(val, min(shots, MOST_VAL), stream)


def _sample(labels: Sequence[int], shots: int, stream: Random) -> list[int]:
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(int(label), []).append(position)
    chosen: list[int] = []
    for positions in members.values():
        chosen += positions if len(positions) < shots else stream.sample(positions, shots)
    return chosen
