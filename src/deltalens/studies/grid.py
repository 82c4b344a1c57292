"""The runs of a study: which there are, and which are left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltalens.studies.study import BackboneEntry, DatasetEntry, Study, Variant, folder_name
from deltalens.studies.trial import Run, run_config, score

RUNS = "runs"


class Grid:
    """Every run of a study, in a folder each under `output`/runs; the folders are all the state there is.

    Cells are (backbone, dataset, method). A cell has one search run for each candidate rate (none where there is but
    one), with the first seed, and one final run for each seed.
    """

    def __init__(self, study: Study, output: str | os.PathLike):
        self.study, self.output = study, Path(output)
        self.searches: dict[tuple[str, str, str], list[Run]] = {}
        self.finals: dict[tuple[str, str, str], list[Run]] = {}
        for backbone in study.backbones:
            for dataset in study.datasets:
                for variant in study.variants:
                    self._add_cell(backbone, dataset, variant)

    def _add_cell(self, backbone: BackboneEntry, dataset: DatasetEntry, variant: Variant) -> None:
        place = self.output / RUNS
        for name in (backbone.label, dataset.name, variant.label):
            place /= folder_name(name)
        study, cell = self.study, (backbone.label, dataset.name, variant.label)
        candidates = study.candidates(variant)
        searched = len(candidates) > 1
        self.searches[cell] = [
            Run("search", backbone, dataset, variant, study.seeds[0], place / f"lr-{rate:g}", rate)
            for rate in (candidates if searched else [])
        ]
        only = None if searched else candidates[0]
        self.finals[cell] = [
            Run("final", backbone, dataset, variant, seed, place / f"seed-{seed}", only) for seed in study.seeds
        ]

    def runs(self) -> Iterator[Run]:
        """All runs in the order they are done: every cell with the first seed, then every cell with the second, ..., so
        that a table of all methods is there as early as can be."""
        for index in range(len(self.study.seeds)):
            for cell in self.finals:
                if index == 0:
                    yield from self.searches[cell]
                yield self.finals[cell][index]

    # ------------------------------------------------------------------ what the folders say
    def state(self, run: Run) -> str:
        """ "finished", "failed" or "open"."""
        if run.output.finished:
            return "finished"
        return "failed" if run.failure() is not None else "open"

    def chosen_rate(self, cell: tuple[str, str, str]) -> float | None:
        """The candidate with the best validation accuracy after its last epoch, the smallest of equals; failed ones are
        out. None while a search is open, or where all have failed."""
        searches = self.searches[cell]
        if not searches:
            return self.finals[cell][0].rate
        if any(self.state(run) == "open" for run in searches):
            return None
        accuracies = {run.rate: score(run.results()["val"]) for run in searches if run.output.finished}
        return max(accuracies, key=lambda rate: (accuracies[rate], -rate)) if accuracies else None

    def check_unchanged(self) -> None:
        """ValueError where a folder holds a run that the study now describes otherwise."""
        for run in self.runs():
            earlier = run.output.read_config()
            found = list(_differences(earlier or {}, run_config(self.study, run)))
            if found:
                raise ValueError(
                    f"{run.folder} was trained with other settings: {'; '.join(found)}. Name another --output, or "
                    "remove that folder to train it again"
                )

    def counts(self) -> dict[str, int]:
        """State -> number of runs."""
        found = {"finished": 0, "failed": 0, "open": 0}
        for run in self.runs():
            found[self.state(run)] += 1
        return found


def _differences(earlier: Any, wanted: Any, field: str = "") -> Iterator[str]:
    """Where two nested configurations differ, as far as both name a thing: settings that came later do not count."""
    if isinstance(earlier, dict) and isinstance(wanted, dict):
        for key in wanted:
            if key in earlier:
                yield from _differences(earlier[key], wanted[key], f"{field}.{key}".lstrip("."))
    elif isinstance(earlier, list) and isinstance(wanted, list) and len(earlier) == len(wanted):
        for index, (before, now) in enumerate(zip(earlier, wanted, strict=True)):
            yield from _differences(before, now, f"{field}.{index}")
    elif earlier != wanted:
        yield f"{field} was {earlier!r} and is {wanted!r}"
