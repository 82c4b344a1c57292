"""The harmonic mean of base and novel accuracy."""

from __future__ import annotations


def harmonic_mean(base: float, novel: float) -> float:
    """2 base novel / (base + novel); 0 where both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
