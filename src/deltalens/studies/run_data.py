"""The images of a study's runs: each dataset is read once; those of the present backbone and dataset stay in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from deltalens.data.formats import read_data
from deltalens.data.inputs import kept_inputs
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits
from deltalens.studies.published import NOVEL
from deltalens.studies.study import DatasetEntry, Study, Training

if TYPE_CHECKING:
    from deltalens.studies.trial import Run


class RunData:
    """Reads what runs train on and are tested on."""

    def __init__(self, study: Study):
        self.study = study
        self._read: dict[tuple[Any, ...], Splits] = {}
        self._present: tuple[tuple[str, str, str] | None, dict[str, tuple[Any, Dataset]]] = (None, {})

    # ------------------------------------------------------------------ as they are read
    def splits(self, run: Run) -> Splits:
        """What a run trains and is tested on, without transforms."""
        classes = "base" if self.study.base_to_novel else "all"
        splits = self._splits(run.dataset, classes, run.dataset.shots, run.seed)
        if run.dataset.protocol == "trainval" and splits.test is None:
            raise ValueError(f"{run.dataset.source} has no test images, and the protocol trainval leaves none for val")
        return splits

    def elsewhere(self, run: Run) -> dict[str, Splits]:
        """Name -> other data that a trained model is tested on: the novel classes, and the study's targets."""
        found = {NOVEL: self._splits(run.dataset, "new", None, 0)} if self.study.base_to_novel else {}
        found |= {target.name: self._splits(target, "all", None, 0) for target in self.study.targets}
        for name, splits in found.items():
            if splits.test is None or splits.task != "classification":
                raise ValueError(f"{name} has no test images with one label each, and only those are looked at there")
        return found

    def _splits(self, dataset: DatasetEntry, classes: str, shots: int | None, seed: int) -> Splits:
        drawn = None if shots is None else (shots, seed)
        key = (dataset.source, dataset.path, classes, drawn)
        if key not in self._read:
            split = self.study.split
            options = ReadOptions(
                split.val_fraction,
                split.test_fraction,
                split.seed,
                allow_missing_classes=True,
                download=dataset.download,
                shots=shots,
                shots_seed=seed,
                subset=classes,
                task=self.study.task,
            )
            self._read[key] = read_data(dataset.path, dataset.format, options=options)
        return self._read[key]

    # ------------------------------------------------------------------ as the models see them
    def prepared(self, run: Run, preprocessing: dict[str, Any], training: Training) -> Splits:
        """A run's data with the transforms for its backbone, and train and val together where the run asks for it."""
        splits, drawn = self.splits(run), run.seed if run.dataset.shots else None
        splits = run.dataset.subset.take(splits.joined() if run.joined else splits)
        augmentation = training.augmentation
        here = self._kept(run)

        def train() -> Dataset:
            return kept_inputs(splits.train, preprocessing, augmentation)

        part = "train and val" if run.joined else "train"
        kept = here(part, (run.dataset.name, drawn, augmentation), train)
        val = splits.val and here("val", (run.dataset.shots, drawn), lambda: kept_inputs(splits.val, preprocessing))
        return replace(splits, train=kept, val=val, test=self._test(run, "test", splits, preprocessing))

    def prepared_elsewhere(self, run: Run, preprocessing: dict[str, Any]) -> dict[str, Splits]:
        """`elsewhere` with the transforms for a run's backbone."""
        return {
            name: replace(splits, train=None, val=None, test=self._test(run, f"test {name}", splits, preprocessing))
            for name, splits in self.elsewhere(run).items()
        }

    def _test(self, run: Run, part: str, splits: Splits, preprocessing: dict[str, Any]) -> Dataset | None:
        return splits.test and self._kept(run)(part, None, lambda: kept_inputs(splits.test, preprocessing))

    def _kept(self, run: Run) -> Callable[[str, Any, Callable[[], Dataset]], Dataset]:
        """(part, what it depends on, how to make it) -> the part, made where it is not there, or is another's."""
        key = (run.backbone.label, run.dataset.source, json.dumps(run.variant.backbone, sort_keys=True))
        if self._present[0] != key:
            self._present = (key, {})  # let go of the images before others are read
        parts = self._present[1]

        def find(part: str, made_of: Any, make: Callable[[], Dataset]) -> Dataset:
            if part not in parts or parts[part][0] != made_of:
                parts.pop(part, None)
                parts[part] = (made_of, make())
            return parts[part][1]

        return find
