"""What is done about items of a dataset that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def without_broken_items(dataset: Any, problems: Sequence[str | None], kind: str, skip_broken: bool) -> Any:
    """The dataset where there is no problem. Otherwise ValueError with the problems, or the items without one, and the
    others are printed. problems: one for each item, naming it; None where it can be read. kind: "images", "clouds"."""
    broken = [problem for problem in problems if problem]
    if not broken:
        return dataset
    shown = "; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
    if not skip_broken:
        raise ValueError(
            f"{len(broken)} of {len(dataset)} {kind} cannot be read: {shown}. Repair or remove them, or pass "
            "skip_broken (--skip-broken true) to leave them out"
        )
    print(f"left out {len(broken)} of {len(dataset)} {kind} that cannot be read: {shown}")
    return dataset.subset([i for i, problem in enumerate(problems) if not problem])
