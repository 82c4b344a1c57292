"""The number that base-to-novel results are compared by."""


def harmonic_mean(base: float, novel: float) -> float:
    """2 base novel / (base + novel): near the smaller of the two accuracies; 0 where both are 0.

    ValueError for a negative number.
    """
    if base < 0 or novel < 0:
        raise ValueError(f"accuracies are at least 0, got {base} and {novel}")
    return 2 * base * novel / (base + novel) if base + novel else 0.0
