"""Which test images to show: some that every method gets right, and more that tell the methods apart."""

from __future__ import annotations

from collections import Counter

import numpy as np

SHARE_OF_EASY = 0.2


def choose_pictures(correct: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Indices of `count` test images, fewer where there are fewer, easy ones first.

    correct: bool (methods, images); labels: (images,). A fifth are images that every method gets right. The others
    are images that some method gets wrong, so picked that different methods fail, on different classes; within that,
    the first ones.
    """
    easy = np.flatnonzero(correct.all(0))
    contested = np.flatnonzero(~correct.all(0))
    wanted = min(len(easy), max(round(SHARE_OF_EASY * count), count - len(contested)))
    classes: Counter[int] = Counter()
    chosen = _varied(easy, correct, labels, wanted, classes)
    return chosen + _varied(contested, correct, labels, count - wanted, classes)


def _varied(
    candidates: np.ndarray, correct: np.ndarray, labels: np.ndarray, count: int, classes: Counter[int]
) -> list[int]:
    """Greedy: the rarest class so far, then the rarest pattern of failures so far, then the first image."""
    patterns: Counter[bytes] = Counter()
    left = [int(index) for index in candidates]
    chosen: list[int] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda i: (classes[int(labels[i])], patterns[correct[:, i].tobytes()], i))
        left.remove(best)
        chosen.append(best)
        classes[int(labels[best])] += 1
        patterns[correct[:, best].tobytes()] += 1
    return chosen
