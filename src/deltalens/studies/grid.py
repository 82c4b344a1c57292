"""The runs of a study: which there are, and which are left."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltalens.studies.candidates import Candidate, short_name, value_text
from deltalens.studies.main_metrics import score
from deltalens.studies.search_space import METHOD, has_setting
from deltalens.studies.study import BackboneEntry, DatasetEntry, Study, Training, Variant, folder_name
from deltalens.studies.trial import Run, run_config

RUNS = "runs"


class Grid:
    """Every run of a study, in a folder each under `output`/runs; the folders are all the state there is.

    Cells are (backbone, dataset, method). A cell has one search run for each candidate of its search (none where there
    is but one), with the first seed, and one final run for each seed.
    """

    def __init__(self, study: Study, output: str | os.PathLike):
        self.study, self.output = study, Path(output)
        self.searches: dict[tuple[str, str, str], list[Run]] = {}
        self.finals: dict[tuple[str, str, str], list[Run]] = {}
        self._scores: dict[Path, tuple[int, float | None]] = {}
        for backbone in study.backbones:
            for dataset in study.datasets:
                for variant in study.variants:
                    self._add_cell(backbone, dataset, variant)

    def _add_cell(self, backbone: BackboneEntry, dataset: DatasetEntry, variant: Variant) -> None:
        place = self.output / RUNS
        for name in (backbone.label, dataset.name, variant.label):
            place /= folder_name(name)
        study, cell = self.study, (backbone.label, dataset.name, variant.label)
        variant = variant.on(dataset.source)
        candidates = study.candidates(variant)
        searched = len(candidates) > 1
        self.searches[cell] = [
            Run("search", backbone, dataset, variant, study.seeds[0], place / search_folder(each), each)
            for each in (candidates if searched else [])
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
        """ "finished", "failed" or "open". A final run of other values than the search has chosen since is open."""
        if not run.output.finished and run.failure() is None:
            return "open"
        if run.stage == "final":
            chosen = self.chosen(run.cell)
            if self._searching(run.cell) or not run.done_with(None if chosen is None else chosen.values):
                return "open"
        return "finished" if run.output.finished else "failed"

    def _searching(self, cell: tuple[str, str, str]) -> bool:
        return any(self.state(run) == "open" for run in self.searches[cell])

    def chosen(self, cell: tuple[str, str, str]) -> Candidate | None:
        """The candidate with the best validation accuracy after its last epoch, the first of equals; failed ones are
        out. None while a search is open, or where all have failed."""
        searches = self.searches[cell]
        if not searches:
            return self.finals[cell][0].candidate
        if self._searching(cell):
            return None
        scores = [(self._score(run), run.candidate) for run in searches]
        found = [(value, candidate) for value, candidate in scores if value is not None and math.isfinite(value)]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def search_of(self, run: Run, chosen: Candidate) -> Run | None:
        """The search whose training a final run would repeat: the same values, seed and images."""
        same = (each for each in self.searches[run.cell] if each.candidate == chosen)
        return next((each for each in same if run.stage == "final" and each.seed == run.seed and not run.joined), None)

    def _score(self, run: Run) -> float | None:
        """A finished run's validation accuracy; read once for every state of its file, since there may be thousands."""
        if not run.output.finished:
            return None
        changed = run.output.results.stat().st_mtime_ns
        if self._scores.get(run.folder, (None,))[0] != changed:
            results = run.results()
            self._scores[run.folder] = (changed, score(results["val"], results.get("main_metric")))
        return self._scores[run.folder][1]

    def check_unchanged(self) -> None:
        """ValueError where a folder holds a run that the study now describes otherwise."""
        for run in self.runs():
            earlier = run.output.read_config()
            if earlier is None:
                continue
            done = earlier.get("values", {"lr": earlier.get("lr")})
            values = (
                {name: each for name, each in done.items() if _applies(name, run)} if run.values is None else run.values
            )
            wanted = run_config(self.study, run, values)
            defaults = json.loads(json.dumps(asdict(Training())))
            earlier["training"] = defaults | earlier.get("training", {})  # younger fields had their default
            found = list(_differences(earlier, wanted))
            options = earlier.get("backbone", {}).get("options", {})
            if options != wanted["backbone"]["options"]:
                found.append(f"backbone.options was {options!r} and is {wanted['backbone']['options']!r}")
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


def _applies(name: str, run: Run) -> bool:
    return not name.startswith(METHOD) or has_setting(run.variant.methods, name.removeprefix(METHOD))


def search_folder(candidate: Candidate) -> str:
    """ "lr-0.003,weight_decay-0.01"."""
    return ",".join(
        folder_name(f"{short_name(name)}-{value_text(candidate.values[name])}") for name in candidate.searched
    )


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
