"""Some of a study's runs, named by words: `--only Mona seed-0`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from deltalens.studies.grid import Grid
from deltalens.studies.trial import Run

FIELDS: dict[str, Callable[[Run], tuple[str, ...]]] = {
    "method": lambda run: (run.variant.label,),
    "dataset": lambda run: (run.dataset.name,),
    "backbone": lambda run: (run.backbone.label,),
    "run": lambda run: (run.folder.name, *((f"seed {run.seed}",) if run.stage == "final" else ())),
}


def matching(grid: Grid, words: Sequence[str]) -> list[Run]:
    """The runs that words name, in their order; without words all.

    A word is a method, a dataset, a backbone, or the last folder of a run (`seed-0`, `lr-0.003`); `*` and `?` stand for
    other letters, and capitals do not matter. Words for the same of these add to each other, words for different ones
    narrow the choice. Raises ValueError for a word that names nothing, and where no run matches all.
    """
    runs = list(grid.runs())
    wanted: dict[str, list[str]] = {}
    for word in words:
        field = next((name for name, of in FIELDS.items() if any(_is_named(of(run), [word]) for run in runs)), None)
        if field is None:
            raise ValueError(f"--only {word!r} matches nothing; there is {_what_there_is(runs)}")
        wanted.setdefault(field, []).append(word)
    found = [run for run in runs if all(_is_named(FIELDS[field](run), named) for field, named in wanted.items())]
    if not found:
        raise ValueError(f"no run matches all of --only {', '.join(words)}; there is {_what_there_is(runs)}")
    return found


def with_searches(grid: Grid, runs: Sequence[Run]) -> list[Run]:
    """These runs, and the searches that final runs among them wait for, in the order of the study."""
    folders = {run.folder for run in runs}
    cells = {run.cell for run in runs if run.stage == "final"}
    return [run for run in grid.runs() if run.folder in folders or (run.stage == "search" and run.cell in cells)]


def _is_named(names: Sequence[str], words: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), word.lower()) for name in names for word in words)


def _what_there_is(runs: Sequence[Run]) -> str:
    parts = []
    for field, of in FIELDS.items():
        names = dict.fromkeys(of(run)[0] for run in runs)
        parts.append(f"{field} {', '.join(names)}")
    return "; ".join(parts)
