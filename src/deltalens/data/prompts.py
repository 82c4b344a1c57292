"""What is said of an image: templates of the benchmark datasets, and readers of files with templates or sentences.

A template has one `{}`, in which a class name is put, with "_" as a space.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltalens.backbones.class_prompts import IMAGENET_SELECT as IMAGENET_SELECT
from deltalens.data.coop_lists import spoken

PHOTO = "a photo of a {}."
TEMPLATES = {
    "imagenet": PHOTO,
    "caltech-101": PHOTO,
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": PHOTO,
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food-101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": PHOTO,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenetv2": PHOTO,
    "imagenet-sketch": PHOTO,
    "imagenet-adversarial": PHOTO,
    "imagenet-rendition": PHOTO,
}


def fill(templates: Sequence[str], class_names: Sequence[str]) -> list[list[str]]:
    """The prompts of every class: each template with the class's name.

    Raises ValueError for no templates, and for one that has not exactly one `{}`.
    """
    if not templates:
        raise ValueError("no templates given")
    for template in templates:
        _check_template(template, "the templates")
    return [[template.replace("{}", spoken(name)) for template in templates] for name in class_names]


def read_templates(file: str | os.PathLike) -> list[str]:
    """Templates of a text file, one on a line, or of a JSON file with a list of them.

    Raises FileNotFoundError, and ValueError for a line without exactly one `{}`.
    """
    place = _existing(file)
    if place.suffix.lower() == ".json":
        content = _json(place)
        if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
            raise ValueError(f"{place} is no list of templates")
        lines = list(enumerate(content, 1))
    else:
        text = place.read_text(encoding="utf-8-sig")
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, template in lines:
        _check_template(
            template, f"line {number} of {place}" if place.suffix != ".json" else f"item {number} of {place}"
        )
    if not lines:
        raise ValueError(f"{place} holds no templates; write one on a line, such as {PHOTO!r}")
    return [template for _, template in lines]


def read_sentences(file: str | os.PathLike, class_names: Sequence[str]) -> list[list[str]]:
    """Sentences of every class, in the order of `class_names`, from a JSON file of class -> list of sentences, as CuPL
    and descriptor files are.

    A class is found by its name, else by the name in small letters with spaces for "_" and "-", else by the same words
    in another order (cars: "2012 Audi TTS Coupe" and "Audi TTS Coupe 2012"). Empty sentences are passed over, and
    so are classes that only the file has. Raises FileNotFoundError, and ValueError for classes without sentences.
    """
    place = _existing(file)
    content = _json(place)
    if not isinstance(content, dict):
        raise ValueError(f"{place} is no mapping of class names to lists of sentences")
    for name, sentences in content.items():
        if not isinstance(sentences, list) or not all(isinstance(each, str) for each in sentences):
            raise ValueError(f"{place} has no list of sentences for {name!r}")
    told = {name: [each.strip() for each in sentences if each.strip()] for name, sentences in content.items()}
    indexes = [(key, _index(told, key)) for key in (str, _plain, _sorted_words)]
    found, missing = [], []
    for name in class_names:
        match = next((index[key(name)] for key, index in indexes if key(name) in index), None)
        if match is None or not told[match]:
            missing.append(name)
        else:
            found.append(told[match])
    if missing:
        shown = ", ".join(_with_nearest(name, told) for name in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(
            f"{place} has no sentences for {len(missing)} of the {len(class_names)} classes: {shown}{more}; "
            f"it has {len(told)} classes, such as {', '.join(list(told)[:3]) or 'none'}"
        )
    return found


# ------------------------------------------------------------------ details
def _existing(file: str | os.PathLike) -> Path:
    place = Path(file).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"no file {place}")
    return place


def _json(place: Path) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from None


def _check_template(template: str, where: str) -> None:
    if template.count("{}") != 1:
        raise ValueError(f"{where}: {template!r} needs exactly one {{}} for the class name, such as {PHOTO!r}")


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _sorted_words(name: str) -> str:
    return " ".join(sorted(_plain(name).split()))


def _with_nearest(name: str, told: dict[str, list[str]]) -> str:
    """The name of a missing class, and the nearest one that has sentences."""
    near = difflib.get_close_matches(name, [each for each, sentences in told.items() if sentences], n=1)
    return f"{name} (there is {near[0]!r})" if near else name


def _index(content: dict[str, Any], key: Callable[[str], str]) -> dict[str, str]:
    """key(name) -> name, for the names whose key is their own."""
    keys = [key(name) for name in content]
    return {each: name for each, name in zip(keys, content, strict=True) if keys.count(each) == 1}
