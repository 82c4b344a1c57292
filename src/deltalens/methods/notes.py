"""What modules say about a forward besides its result, for loss terms of the same step (a balance of experts).

Nothing stays on modules: a task opens a page, runs the model, and asks the methods for their terms while it is open.
Notes may carry a graph. A block that activation checkpointing runs again, in backward, finds no page open; what it
computes for a note must therefore not depend on whether one is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_PAGES: list[list[tuple[Any, Tensor]]] = []


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Open a page for the notes of one forward."""
    _PAGES.append([])
    try:
        yield
    finally:
        _PAGES.pop()


def note(author: Any, value: Tensor) -> None:
    """Write a value on the open page; without one nothing happens. author: whom `notes_of` is asked for."""
    if _PAGES:
        _PAGES[-1].append((author, value))


def notes_of(author: Any) -> list[Tensor]:
    """What equal authors have written on the open page, in the order of the calls."""
    return [value for other, value in _PAGES[-1] if other == author] if _PAGES else []
