"""What a search in a study tries. All of it is drawn before anything is trained, so that runs may go in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deltalens.methods import Method
from deltalens.studies.search_space import METHOD, Range, SearchSpace, Value, has_setting, rate_of

Values = Mapping[str, Value]
BARREN = 1000  # draws in a row without a new point, after which a space is taken to be exhausted


@dataclass(frozen=True)
class SearchPlan:
    """A space, and how many of its points every method may try."""

    space: SearchSpace
    trials: int


@dataclass(frozen=True)
class Candidate:
    """One point. values: by name, options and `method.<setting>`; "lr" is always among them, and base_lr never.
    searched: the names that were chosen, for the name of a folder. edges: those at an edge of the space."""

    values: Values
    searched: tuple[str, ...] = ()
    edges: frozenset[str] = frozenset()

    @property
    def shown(self) -> Values:
        """What a search varies, or the rate where nothing was searched."""
        return {name: self.values[name] for name in self.searched or ("lr",)}


def space_for(space: SearchSpace, methods: Sequence[Method]) -> SearchSpace:
    """The space without the settings that none of these methods has."""

    def applies(name: str) -> bool:
        return not name.startswith(METHOD) or has_setting(methods, name.removeprefix(METHOD))

    return replace(
        space,
        space={name: each for name, each in space.space.items() if applies(name)},
        fixed={name: each for name, each in space.fixed.items() if applies(name)},
    )


def draw_candidates(
    plan: SearchPlan, methods: Sequence[Method], rate: Callable[[int], float], batch_size: int, seed: int
) -> list[Candidate]:
    """At most plan.trials different candidates, ascending by learning rate, else in the order of the space.

    The points are drawn from the whole space by the seed alone. A method that lacks a setting has its points without
    it, and where two become one, the next takes its place: methods share as many points as can be. A space with fewer
    different points ends with the last.

    rate: batch size -> rate of the method, which relative rates multiply, and which holds where the space has none.
    batch_size: where the search does not choose it.
    """
    own = space_for(plan.space, methods)
    size = own.size()
    whole = size is not None and (own.sampler == "grid" or size <= plan.trials)
    found: dict[tuple[Value, ...], dict[str, Value]] = {}
    barren = 0
    for point in _points(plan.space, seed, whole):
        key = tuple(point[name] for name in own.space)
        barren = barren + 1 if key in found else 0
        if len(found) == min(plan.trials, size or plan.trials) or barren == BARREN:
            break
        found.setdefault(key, {name: point[name] for name in own.space})
    points = list(found.values())
    if whole:
        order = {tuple(point.values()): index for index, point in enumerate(own.grid())}
        points.sort(key=lambda point: order[tuple(point.values())])
    return sorted((_candidate(own, p, rate, batch_size) for p in points), key=lambda c: c.values["lr"])


def _points(space: SearchSpace, seed: int, whole: bool) -> Iterator[dict[str, Value]]:
    """Points of the whole space: a grid's shuffled, else drawn without end, every dimension by itself."""
    if whole and space.size() is not None:
        yield from space.points(seed)
        return
    number = 0
    while True:
        yield {name: each.draw(random.Random(f"{seed}/{number}/{name}")) for name, each in space.space.items()}
        number += 1


def _candidate(
    space: SearchSpace, point: Mapping[str, Value], rate: Callable[[int], float], batch_size: int
) -> Candidate:
    raw = {**space.fixed, **point}
    batch_size = raw.get("batch_size", batch_size)
    values: dict[str, Value] = {}
    for name, value in raw.items():
        parameter = space.space.get(name)
        if name == "base_lr":
            values["lr"] = rate_of(value, batch_size)
        elif parameter is not None and parameter.relative:
            digits = 3 if isinstance(parameter, Range) else 4
            values["lr"] = float(f"{rate(batch_size) * value:.{digits}g}")
        else:
            values[name] = value
    values.setdefault("lr", rate(batch_size))
    searched = ["lr" if name == "base_lr" else name for name in point]
    at_edge = {"lr" if n == "base_lr" else n for n, value in point.items() if space.space[n].at_edge(value)}
    return Candidate(values, tuple(searched), frozenset(at_edge))


# ------------------------------------------------------------------ texts
def short_name(name: str) -> str:
    """A setting's name without "method."."""
    return name.removeprefix(METHOD)


def value_text(value: Value) -> str:
    """A number in as few digits as tell it."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def values_text(values: Values, edges: frozenset[str] = frozenset(), mark: str = " *") -> str:
    """ "lr 0.003 *, weight_decay 0.01": the values, those at an edge marked."""
    return ", ".join(
        f"{short_name(name)} {value_text(value)}" + (mark if name in edges else "") for name, value in values.items()
    )
