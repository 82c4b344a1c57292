"""Reads what a study searches, and checks that its rows agree with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltalens.studies.candidates import SearchPlan, space_for
from deltalens.studies.recipe_files import recipe_files
from deltalens.studies.search_space import FIELDS as SPACE_FIELDS
from deltalens.studies.search_space import (
    METHOD,
    RATES,
    Factors,
    Range,
    SearchSpace,
    check_named_once,
    factors,
    has_setting,
    parse_space,
)
from deltalens.studies.study import Study, Variant
from deltalens.studies.study_fields import TRAINING, plain_field
from deltalens.studies.study_yaml import Document, Place

FIELDS = ("space", "trials", "sampler", "fixed")


def read_search(document: Document, value: Any, place: Place) -> SearchPlan:
    """The entry `search`: a mapping with space (written out, a file beside the study, or a name of the package's),
    trials, sampler and fixed."""
    entry = document.mapping(value, place, FIELDS)
    if isinstance(entry.get("space"), str):
        space = _named_space(document, entry, place)
    else:
        space = parse_space(document, entry, place, "random")
        _check_values(document, space, place)
    if space.sampler == "tpe":
        raise document.error(
            (*place, "sampler"),
            "tpe chooses by the trials before, and a study draws all of them before the first; say sampler: random",
        )
    trials = entry.get("trials", space.size() if space.sampler == "grid" else None)
    if trials is None:
        raise document.error(place, "trials is missing: the number of trials of every method, such as trials: 12")
    return SearchPlan(space, document.number(trials, (*place, "trials"), whole=True, above=0))


def relative_search(document: Document, value: Any, place: Place) -> SearchPlan:
    """The entry `lr: {relative: [...]}`: a grid over the rate alone."""
    given = document.mapping(value, place, ("relative",)).get("relative")
    found = Factors(tuple(sorted(factors(document, given, (*place, "relative")).values)))
    return SearchPlan(SearchSpace("grid", {"lr": found}), len(found.values))


def _named_space(document: Document, entry: Mapping[str, Any], place: Place) -> SearchSpace:
    """The space of a file, with the sampler and the fixed values of the study."""
    file = _space_file(document, entry["space"], (*place, "space"))
    named = Document(file)
    content = named.mapping(named.content, (), SPACE_FIELDS)
    if "sampler" in entry:
        content["sampler"] = entry["sampler"]
    space = parse_space(named, content, (), "random")
    _check_values(named, space, ())
    if not entry.get("fixed"):
        return space
    only_fixed = {"space": {"lr": [1.0]}, "fixed": entry["fixed"]}
    if set(RATES) & set(document.mapping(entry["fixed"], (*place, "fixed"))):
        only_fixed["space"] = {"weight_decay": [0.0]}
    more = parse_space(document, only_fixed, place, "grid").fixed
    check_named_once(document, (*place, "fixed"), [*space.space, *space.fixed, *more])
    _check_values(document, SearchSpace("grid", {}, more), place)
    return replace(space, fixed={**space.fixed, **more})


def _space_file(document: Document, name: str, place: Place) -> Path:
    beside, known = document.file_of(place).parent / name, recipe_files("tune")
    if beside.is_file():
        return beside
    if name in known:
        return known[name]
    near = ", ".join(difflib.get_close_matches(name, known, n=2) or list(known))
    raise document.error(
        place, f"there is no search space {name!r} beside this file, nor one of that name in the package; it has {near}"
    )


def _check_values(document: Document, space: SearchSpace, place: Place) -> None:
    """Every value of an option has that option's type."""
    for name, value in space.fixed.items():
        _check_value(document, name, value, (*place, "fixed", name))
    for name, parameter in space.space.items():
        where = (*place, "space", name)
        for value in (parameter.low, parameter.high) if isinstance(parameter, Range) else parameter.values:
            _check_value(document, name, value, where)
        if isinstance(parameter, Range) and isinstance(TRAINING.get(name), str):
            raise document.error(where, "expected a list of values")


def _check_value(document: Document, name: str, value: Any, place: Place) -> None:
    if name in RATES:
        document.number(value, place, above=0)
    elif not name.startswith(METHOD):
        plain_field(document, value, (*place[:-1], name), TRAINING[name])


# ------------------------------------------------------------------ a whole study
def check_rows(document: Document, study: Study) -> None:
    """Every row can be trained with every candidate, says nothing that its search chooses, and keeps to a fair
    protocol. ValueError at the place that is wrong."""
    rows: list[tuple[Place, Variant]] = [(("methods", variant.label), variant) for variant in study.variants]
    rows += [((*place, "datasets", name), each) for place, row in rows for name, each in row.datasets.items()]
    for place, variant in rows:
        if study.protocol == "fair" and variant.own_fields:
            raise document.error(
                (*place, variant.own_fields[0]),
                "under protocol: fair no method has settings of its own beside those of the method; leave it out, or "
                "say protocol: published",
            )
        _check_said_once(document, study, variant, place)
        _check_candidates(document, study, variant, place)
    _check_settings_exist(document, study)


def _check_said_once(document: Document, study: Study, variant: Variant, place: Place) -> None:
    plan = study.search_of(variant)
    if plan is None:
        return
    space = space_for(plan.space, variant.methods)
    said = [("training", name) for name in variant.training if name in space.space or name in space.fixed]
    if space.chooses_rate:
        said += [(name,) for name in RATES if getattr(variant, name) is not None]
    if said:
        raise document.error(
            (*place, *said[0]), "the search of this row chooses it; leave it out, or give the row another search"
        )


def _check_candidates(document: Document, study: Study, variant: Variant, place: Place) -> None:
    try:
        for candidate in study.candidates(variant):
            values = candidate.values
            study.training_of(variant, values=values).settings(values["lr"], seed=0)
            study.methods_of(variant, values)
    except (TypeError, ValueError) as error:
        where = (*place, "search") if variant.own_search else ("search",) if study.search_of(variant) else place
        raise document.error(where, f"{variant.label}: {error}") from error


def _check_settings_exist(document: Document, study: Study) -> None:
    """A `method.<setting>` that no method has is a mistake."""
    users: dict[Place, list[Variant]] = {}
    for variant in study.variants:
        place: Place = ("methods", variant.label, "search") if variant.own_search else ("search",)
        users.setdefault(place, []).append(variant)
    for place, variants in users.items():
        plan = study.search_of(variants[0])
        for name in [*plan.space.space, *plan.space.fixed] if plan else ():
            setting = name.removeprefix(METHOD)
            if setting != name and not any(has_setting(variant.methods, setting) for variant in variants):
                labels = ", ".join(variant.label for variant in variants)
                raise document.error(place, f"names {name}, and no method of {labels} has a setting {setting!r}")
