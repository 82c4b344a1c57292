"""What every reader of a format is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """val_fraction, test_fraction, seed: how parts that the data lacks are split off. skip_broken: leave out images
    that cannot be read. allow_missing_classes: splits may lack classes of each other. download: fetch what is not
    there, where a format knows how."""

    val_fraction: float = 0.15
    test_fraction: float = 0.15
    seed: int = 0
    skip_broken: bool = False
    allow_missing_classes: bool = False
    download: bool = False


def refuse_variant(name: str, which: str, known: tuple[str, ...] = ()) -> None:
    """ValueError for `name/which` where the format has no such variant. The empty variant is always known."""
    if which and which not in known:
        has = f"it has {', '.join(f'{name}/{each}' for each in known)}" if known else f"write {name} alone"
        raise ValueError(f"the format {name} has no variant {which!r}; {has}")
