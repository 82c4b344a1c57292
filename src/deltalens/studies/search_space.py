"""What a search may choose: the format that `deltalens tune` and studies share.

    sampler: random                               # or grid; in tune also tpe
    space:
      lr: {relative: [0.1, 10]}                   # log-uniform, times the method's own default; in a grid: factors
      weight_decay: [0, 1e-4, 1e-3, 1e-2]         # one of these
      method.num_tokens: {low: 1, high: 200, log: true}
    fixed: {optimizer: sgd}                       # the same in every trial

Names are options of `deltalens train` (`lr`, `weight_decay`, `batch_size`...), `base_lr`, which is the learning rate
for 256 images a step and scales with the batch size, as the papers have it, and `method.<setting>` for a setting of
the method, or of whichever of several methods has it.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltalens.methods import Method
from deltalens.studies.study_yaml import Document, Place

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid")
RATES = ("lr", "base_lr")
OPTIONS = (*RATES, "weight_decay", "warmup_epochs", "min_lr", "batch_size", "epochs", "optimizer", "clip_grad")
OPTIONS += ("label_smoothing", "min_crop", "hflip", "rand_augment", "cloud_augment")
METHOD = "method."
FIELDS = ("sampler", "space", "fixed")
Value = int | float | str | bool


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]
    relative: ClassVar[bool] = False

    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        return trial.suggest_categorical(name, list(self.values))

    def draw(self, source: random.Random) -> Value:
        return source.choice(self.values)

    def at_edge(self, value: Value) -> bool:
        """Whether a better value may lie beyond: of at least two numbers the smallest or the largest."""
        numbers = [each for each in self.values if not isinstance(each, (str, bool))]
        return len(set(numbers)) > 1 and value in (min(numbers), max(numbers))


@dataclass(frozen=True)
class Factors(Choice):
    """One of several factors on the method's own rate."""

    relative: ClassVar[bool] = True


@dataclass(frozen=True)
class Range:
    """A number between low and high, whole where both are, uniform in its logarithm where `log`.

    relative: low and high are factors on the method's own default.
    """

    low: float
    high: float
    log: bool = False
    relative: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not self.relative

    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def draw(self, source: random.Random) -> Value:
        """Drawn without optuna. A number that is not whole has three digits."""
        margin = 0.5 if self.whole else 0.0
        low, high = self._scaled(self.low - margin), self._scaled(self.high + margin)
        drawn = source.uniform(low, high)
        value = math.exp(drawn) if self.log else drawn
        value = round(value) if self.whole else float(f"{value:.3g}")
        return min(max(value, self.low), self.high)

    def at_edge(self, value: Value) -> bool:
        """Whether a better value may lie beyond: in the outermost twentieth of the range."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(float(value)) - low) / (high - low)
        return not 0.05 < share < 0.95

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


Parameter = Choice | Range


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space."""

    sampler: str
    space: Mapping[str, Parameter]
    fixed: Mapping[str, Value] = field(default_factory=dict)

    @property
    def chooses_rate(self) -> bool:
        """Whether the rate is searched or fixed by a number of its own, and not relative to the method's."""
        return any(
            name in self.fixed or (name in self.space and not self.space[name].relative) for name in ("lr", "base_lr")
        )

    def draw(self, trial: optuna.Trial, default_lr: float, batch_size: int) -> dict[str, Value]:
        """The values of a trial by name: options, and `method.<setting>`. base_lr is given as lr.

        default_lr: of the method. batch_size: where the search does not choose it.
        """
        values: dict[str, Value] = dict(self.fixed)
        for name, each in self.space.items():
            value = each.suggest(trial, name)
            values[name] = value * default_lr if each.relative else value
        if "base_lr" in values:
            values["lr"] = rate_of(values.pop("base_lr"), values.get("batch_size", batch_size))
        return values

    def points(self, seed: int) -> list[dict[str, Value]]:
        """Every point of a grid, in an order drawn from the seed."""
        found = list(self.grid())
        random.Random(seed).shuffle(found)
        return found

    def grid(self) -> Iterable[dict[str, Value]]:
        """Every point of a grid; the last name changes fastest."""
        names = list(self.space)
        for values in product(*(self.space[name].values for name in names)):
            yield dict(zip(names, values, strict=True))

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


def rate_of(base_lr: float, batch_size: int) -> float:
    """The learning rate that base_lr, which is for 256 images a step, means with this batch size."""
    return float(f"{base_lr * batch_size / 256:.6g}")


def has_setting(methods: Iterable[Method], setting: str) -> bool:
    return any(setting in {each.name for each in fields(method)} for method in methods)


def with_values(methods: Sequence[Method], values: Mapping[str, Any]) -> list[Method]:
    """The methods with the `method.<setting>` values of a trial. ValueError where none of them has such a setting."""
    found = list(methods)
    for name, value in values.items():
        setting = name.removeprefix(METHOD)
        if setting == name:
            continue
        having = [i for i, method in enumerate(found) if has_setting([method], setting)]
        if not having:
            names = ", ".join(method.name for method in found)
            raise ValueError(f"the search space names {name}, and {names} has no setting {setting!r}")
        for i in having:
            found[i] = replace(found[i], **{setting: value})
    return found


# ------------------------------------------------------------------ reading
def read_space(path: str | os.PathLike) -> SearchSpace:
    """Read and check a search space. Raises ValueError that names line and field, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no search space at {path}")
    document = Document(path)
    return parse_space(document, document.mapping(document.content, (), FIELDS), ())


def parse_space(
    document: Document, entry: Mapping[str, Any], place: Place, default_sampler: str = "tpe"
) -> SearchSpace:
    """A search space of an entry of a document, with sampler, space and fixed."""
    sampler = entry.get("sampler", default_sampler)
    if sampler not in SAMPLERS:
        raise document.error((*place, "sampler"), f"expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    entries = document.mapping(entry.get("space"), (*place, "space"))
    if not entries:
        raise document.error(place, "space is missing: name at least one option, such as lr: {relative: [0.1, 10]}")
    fixed = document.mapping(entry.get("fixed") or {}, (*place, "fixed"))
    for part, names in (("space", entries), ("fixed", fixed)):
        for name in names:
            _check_name(document, (*place, part, name))
    check_named_once(document, place, [*entries, *fixed])
    space = {
        name: _parameter(document, each, (*place, "space", name), sampler == "grid") for name, each in entries.items()
    }
    for name, value in fixed.items():
        _check_value(document, value, (*place, "fixed", name))
    found = SearchSpace(sampler, space, fixed)
    if sampler == "grid" and found.size() is None:
        where = (*place, "sampler") if "sampler" in entry else place
        raise document.error(where, "a grid needs a list of values for every option, and there is a range")
    return found


def check_named_once(document: Document, place: Place, named: Sequence[str]) -> None:
    if len(set(named)) < len(named) or {"lr", "base_lr"} <= set(named):
        raise document.error(
            place, "every option may be named once, in space or in fixed, and lr or base_lr but not both"
        )


def _check_name(document: Document, place: Place) -> None:
    name = str(place[-1])
    if name not in OPTIONS and not (name.startswith(METHOD) and name != METHOD):
        raise document.error(place, f"there is no such option to search; allowed: {', '.join(OPTIONS)}, method.SETTING")


def _check_value(document: Document, value: Any, place: Place) -> None:
    if not isinstance(value, (int, float, str, bool)):
        raise document.error(place, f"expected a number, text, true or false, got {value!r}")


def _parameter(document: Document, entry: Any, place: Place, grid: bool) -> Parameter:
    if isinstance(entry, list):
        if not entry:
            raise document.error(place, "an empty list leaves nothing to choose")
        for index, value in enumerate(entry):
            _check_value(document, value, (*place, index))
        return Choice(tuple(entry))
    entry = document.mapping(entry, place, ("low", "high", "log", "relative"))
    if "relative" in entry:
        return _relative(document, entry, place, grid)
    for side in ("low", "high"):
        document.number(entry.get(side), (*place, side))
    log = document.flag(entry.get("log", False), (*place, "log"))
    return _range(document, entry["low"], entry["high"], log, place)


def _relative(document: Document, entry: Mapping[str, Any], place: Place, grid: bool) -> Parameter:
    if place[-1] != "lr":
        raise document.error(place, "relative is for lr: methods have a default learning rate")
    if grid:
        return factors(document, entry["relative"], (*place, "relative"))
    ends = entry["relative"]
    if not isinstance(ends, Sequence) or len(ends) != 2:
        raise document.error(
            (*place, "relative"), f"expected two factors such as [0.1, 10], and more only in a grid; got {ends!r}"
        )
    low, high = (float(document.number(factor, (*place, "relative", i))) for i, factor in enumerate(ends))
    return Range(**vars(_range(document, low, high, True, place)) | {"relative": True})


def factors(document: Document, entry: Any, place: Place) -> Factors:
    """A list of different factors on the methods' own rates."""
    if not isinstance(entry, list) or not entry or len(set(map(str, entry))) != len(entry):
        raise document.error(place, f"expected a list of different factors on the methods' own rates, got {entry!r}")
    return Factors(tuple(float(document.number(each, (*place, i), above=0)) for i, each in enumerate(entry)))


def _range(document: Document, low: float, high: float, log: bool, place: Place) -> Range:
    if not low < high:
        raise document.error(place, f"low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise document.error(place, f"a logarithmic range must begin above 0, got {low}")
    return Range(low, high, log)
