"""What a search may choose: a YAML file, and how a trial draws from it.

    sampler: tpe                                  # or random, or grid
    space:
      lr: {relative: [0.1, 10]}                   # log-uniform, times the method's own default
      weight_decay: [0, 1e-4, 1e-3, 1e-2]         # one of these
      method.num_tokens: {low: 1, high: 200, log: true}
    fixed: {optimizer: sgd}                       # the same in every trial

Names are options of `deltalens train` (`lr`, `weight_decay`, `batch_size`...), `base_lr`, which is the learning rate
for 256 images a step and scales with the batch size, as the papers have it, and `method.<setting>` for a setting of
the method, or of whichever of several methods has it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltalens.studies.study_yaml import Document, Place

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid")
OPTIONS = ("lr", "base_lr", "weight_decay", "warmup_epochs", "batch_size", "epochs", "optimizer", "clip_grad")
OPTIONS += ("label_smoothing", "min_crop", "hflip", "rand_augment")
Value = int | float | str | bool


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def draw(self, trial: optuna.Trial, name: str) -> Value:
        return trial.suggest_categorical(name, list(self.values))


@dataclass(frozen=True)
class Range:
    """A number between low and high, whole where both are, uniform in its logarithm where `log`.

    relative: low and high are factors on the method's own default.
    """

    low: float
    high: float
    log: bool = False
    relative: bool = False

    def draw(self, trial: optuna.Trial, name: str) -> Value:
        if isinstance(self.low, int) and isinstance(self.high, int) and not self.relative:
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space."""

    sampler: str
    space: Mapping[str, Choice | Range]
    fixed: Mapping[str, Value] = field(default_factory=dict)

    def draw(self, trial: optuna.Trial, default_lr: float, batch_size: int) -> dict[str, Value]:
        """The values of a trial by name: options, and `method.<setting>`. base_lr is given as lr.

        default_lr: of the method. batch_size: where the search does not choose it.
        """
        values: dict[str, Value] = dict(self.fixed)
        for name, each in self.space.items():
            value = each.draw(trial, name)
            relative = isinstance(each, Range) and each.relative
            values[name] = value * default_lr if relative else value
        if "base_lr" in values:
            values["lr"] = values.pop("base_lr") * values.get("batch_size", batch_size) / 256
        return values

    def points(self, seed: int) -> list[dict[str, Value]]:
        """Every point of a grid, in an order drawn from the seed."""
        names = list(self.space)
        found = [
            dict(zip(names, values, strict=True)) for values in product(*(self.space[name].values for name in names))
        ]
        random.Random(seed).shuffle(found)
        return found

    def size(self) -> int | None:
        """The number of points of the grid, None where a range is among them."""
        count = 1
        for each in self.space.values():
            if isinstance(each, Range):
                return None
            count *= len(each.values)
        return count


DEFAULT = SearchSpace(
    "tpe", {"lr": Range(0.1, 10.0, log=True, relative=True), "weight_decay": Choice((0.0, 1e-4, 1e-2))}
)


def read_space(path: str | os.PathLike) -> SearchSpace:
    """Read and check a search space. Raises ValueError that names line and field, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no search space at {path}")
    document = Document(path)
    top = document.mapping(document.content, (), ("sampler", "space", "fixed"))
    sampler = top.get("sampler", "tpe")
    if sampler not in SAMPLERS:
        raise document.error(("sampler",), f"expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    entries = document.mapping(top.get("space"), ("space",))
    if not entries:
        raise document.error((), "space is missing: name at least one option, such as lr: {relative: [0.1, 10]}")
    fixed = document.mapping(top.get("fixed") or {}, ("fixed",))
    for place in [("space", name) for name in entries] + [("fixed", name) for name in fixed]:
        _check_name(document, place)
    named = [*entries, *fixed]
    if len(set(named)) < len(named) or {"lr", "base_lr"} <= set(named):
        raise document.error((), "every option may be named once, in space or in fixed, and lr or base_lr but not both")
    space = {name: _parameter(document, entry, ("space", name)) for name, entry in entries.items()}
    for name, value in fixed.items():
        _check_value(document, value, ("fixed", name))
    found = SearchSpace(sampler, space, fixed)
    if sampler == "grid" and found.size() is None:
        raise document.error(("sampler",), "a grid needs a list of values for every option, and there is a range")
    return found


def _check_name(document: Document, place: Place) -> None:
    name = str(place[-1])
    if name not in OPTIONS and not (name.startswith("method.") and name != "method."):
        raise document.error(place, f"there is no such option to search; allowed: {', '.join(OPTIONS)}, method.SETTING")


def _check_value(document: Document, value: Any, place: Place) -> None:
    if not isinstance(value, (int, float, str, bool)):
        raise document.error(place, f"expected a number, text, true or false, got {value!r}")


def _parameter(document: Document, entry: Any, place: Place) -> Choice | Range:
    if isinstance(entry, list):
        if not entry:
            raise document.error(place, "an empty list leaves nothing to choose")
        for index, value in enumerate(entry):
            _check_value(document, value, (*place, index))
        return Choice(tuple(entry))
    entry = document.mapping(entry, place, ("low", "high", "log", "relative"))
    if "relative" in entry:
        return _relative(document, entry, place)
    for side in ("low", "high"):
        document.number(entry.get(side), (*place, side))
    log = document.flag(entry.get("log", False), (*place, "log"))
    return _range(document, entry["low"], entry["high"], log, place)


def _relative(document: Document, entry: Mapping[str, Any], place: Place) -> Range:
    factors = entry["relative"]
    if place[-1] != "lr":
        raise document.error(place, "relative is for lr: methods have a default learning rate")
    if not isinstance(factors, Sequence) or len(factors) != 2:
        raise document.error((*place, "relative"), f"expected two factors such as [0.1, 10], got {factors!r}")
    low, high = (float(document.number(factor, (*place, "relative", i))) for i, factor in enumerate(factors))
    return Range(**vars(_range(document, low, high, True, place)) | {"relative": True})


def _range(document: Document, low: float, high: float, log: bool, place: Place) -> Range:
    if not low < high:
        raise document.error(place, f"low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise document.error(place, f"a logarithmic range must begin above 0, got {low}")
    return Range(low, high, log)
