"""What every reader of a format is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """val_fraction, test_fraction, seed: how parts that the data lacks are split off. skip_broken: leave out images
    and clouds that cannot be read. allow_missing_classes: splits may lack classes of each other. download: fetch what
    is not there, where a format knows how.

    shots: so many training images of every class, and at most 4 for validation (`deltalens.data.few_shot`).
    shots_seed: which ones; by default `seed`. stored_shots: read them from `split_fewshot/shot_{n}-seed_{s}.pkl` where
    a dataset of CoOp's has that file. subset: "all" classes, or the "base" or the "new" half of them.

    task: "segmentation", "detection", "instance" or "oriented", where one folder serves several. ignore_index: a value
    of masks that stands for no class, besides 255 and what the data itself says.
    """

    val_fraction: float = 0.15
    test_fraction: float = 0.15
    seed: int = 0
    skip_broken: bool = False
    allow_missing_classes: bool = False
    download: bool = False
    shots: int | None = None
    shots_seed: int | None = None
    stored_shots: bool = True
    subset: str = "all"
    task: str | None = None
    ignore_index: int | None = None

    @property
    def sampling_seed(self) -> int:
        """The seed that few-shot images are drawn by."""
        return self.seed if self.shots_seed is None else self.shots_seed


def refuse_variant(name: str, which: str, known: tuple[str, ...] = ()) -> None:
    """ValueError for `name/which` where the format has no such variant. The empty variant is always known."""
    if which and which not in known:
        has = f"it has {', '.join(f'{name}/{each}' for each in known)}" if known else f"write {name} alone"
        raise ValueError(f"the format {name} has no variant {which!r}; {has}")
