"""Checks of single values that a study file may give for a training, wherever they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from deltalens.data.cloud_transforms import augmentation_words
from deltalens.studies.dense_fields import dense_training
from deltalens.studies.study import Training, folder_name
from deltalens.studies.study_yaml import Document, Place

DENSE = "dense"
SHARES = ("min_crop", "hflip")
NUMBERS_OR_NULL = ("warmup_lr",)
LISTS_OF_NUMBERS = ("decay_at",)
TRAINING = {each.name: getattr(Training(), each.name) for each in fields(Training)}


def plain_fields(document: Document, value: Any, place: Place, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the type of these defaults."""
    found = document.mapping(value, place, defaults)
    return {key: plain_field(document, each, (*place, key), defaults[key]) for key, each in found.items()}


def plain_field(document: Document, value: Any, place: Place, default: Any) -> Any:
    """A value of the type of a default; where that is None, a list of texts, for some fields a number, or None."""
    if place[-1] in LISTS_OF_NUMBERS:
        return _numbers(document, value, place)
    if place[-1] in NUMBERS_OR_NULL:
        return None if value is None else document.number(value, place)
    if default is None:
        return None if value is None else _texts(document, value, place)
    if isinstance(default, str):
        return document.text(str(value), place)
    document.number(value, place, whole=isinstance(default, int))
    if place[-1] in SHARES:
        check_share(document, value, place)
    return value


def training_fields(document: Document, value: Any, place: Place) -> dict[str, Any]:
    """Fields of a `Training`."""
    found = document.mapping(value, place, TRAINING)
    plain = {key: each for key, each in found.items() if key != DENSE}
    dense = {DENSE: dense_training(document, found[DENSE], (*place, DENSE))} if DENSE in found else {}
    return plain_fields(document, plain, place, TRAINING) | dense


def check_training(document: Document, training: Training, said: Mapping[str, Any], place: Place) -> None:
    """What the runner refuses, as an error at the field that was said."""
    try:
        augmentation_words(training.cloud_augment)
        training.settings(lr=1.0, seed=0)
    except ValueError as error:
        named = max((key for key in said if str(error).startswith(key)), key=len, default=None)
        named = "cloud_augment" if named is None and "augmentation of clouds" in str(error) else named
        raise document.error((*place, *([named] if named else [])), str(error)) from error


def check_share(document: Document, value: Any, place: Place) -> None:
    if not 0 <= document.number(value, place) <= 1 or (place[-1] == "min_crop" and value == 0):
        raise document.error(place, f"expected a share between 0 and 1, got {value!r}")


def _texts(document: Document, value: Any, place: Place) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise document.error(place, f"expected a list of texts, or null, got {value!r}")
    return tuple(document.text(each, (*place, index)) for index, each in enumerate(value))


def _numbers(document: Document, value: Any, place: Place) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise document.error(place, f"expected a list of numbers, got {value!r}")
    return tuple(document.number(each, (*place, index)) for index, each in enumerate(value))


def distinct_folders(document: Document, names: Iterable[str], place: Place) -> None:
    """ValueError for two names whose runs would share a folder."""
    folders: dict[str, tuple[int, str]] = {}
    for number, name in enumerate(names):
        first, other = folders.setdefault(folder_name(name), (number, name))
        if first != number:
            raise document.error((*place, name), f"{name!r} and {other!r} would share the folder {folder_name(name)!r}")
