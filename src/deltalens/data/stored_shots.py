"""The few-shot splits that CoOp's code keeps as pickles, read without Dassl and without running what a pickle asks for.

    split_fewshot/shot_16-seed_1.pkl = {"train": [Datum, ...], "val": [Datum, ...]}

A Datum has an absolute path of the machine that wrote it, a label and a class name.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PurePosixPath

from deltalens.data.image_folder import ImageFiles

DATUM = ("dassl.data.datasets.base_dataset", "Datum")
ADVICE = "remove it, or pass stored_shots=False (--stored-shots false) to draw the images anew"


class StoredImage:
    """What is read of a Datum: the path as it was written, and the label."""

    path: str
    label: int

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a Datum without attributes")
        path, label = state.get("_impath"), state.get("_label")
        if not isinstance(path, str) or not isinstance(label, int):
            raise pickle.UnpicklingError("a Datum without a path and a label")
        self.path, self.label = path, label


class _Refused(pickle.UnpicklingError):
    """A pickle that asks for something else than Datum."""


class _OnlyDatum(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == DATUM:
            return StoredImage
        raise _Refused(f"{module}.{name}")


def read_stored(file: Path) -> dict[str, list[StoredImage]]:
    """The lists of a pickle by their names. Nothing but the class Datum is looked up, and that becomes `StoredImage`.

    Raises ValueError for a pickle that asks for anything else, with its name, and for one that holds something else.
    """
    try:
        with open(file, "rb") as stream:
            content = _OnlyDatum(stream).load()
    except _Refused as error:
        raise ValueError(f"{file} asks for {error}, and may only hold {'.'.join(DATUM)}; {ADVICE}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{file} is no stored split: {error}; {ADVICE}") from None
    lists = isinstance(content, dict) and all(
        isinstance(each, list) and all(isinstance(item, StoredImage) and hasattr(item, "path") for item in each)
        for each in content.values()
    )
    if not lists:
        raise ValueError(f"{file} is no stored split: it holds no lists of Datum; {ADVICE}")
    return content


def stored_part(file: Path, part: str, images: ImageFiles, start: Path) -> ImageFiles:
    """The images of one list of a stored split, in its order, with the paths that they have here.

    images: the whole part, with paths below `start`. A stored path is found by its end: the longest one that is the
    path of an image below `start`. Raises ValueError for an image that the part does not have or labels otherwise.
    """
    stored = read_stored(file)
    if part not in stored:
        raise ValueError(f"{file} has no list {part}, but {', '.join(map(str, stored)) or 'nothing'}; {ADVICE}")
    skip = len(str(start)) + 1
    known = {str(path)[skip:].replace(os.sep, "/"): index for index, path in enumerate(images.paths)}
    positions = []
    for item in stored[part]:
        position = _find(item.path, known)
        if position is None:
            raise ValueError(f"{file} names {item.path}, which is not in the {part} part here; {ADVICE}")
        if images.labels[position] != item.label:
            raise ValueError(
                f"{file} labels {item.path} with {item.label}, and here it has {images.labels[position]}; {ADVICE}"
            )
        positions.append(position)
    return images.subset(positions)


def _find(path: str, known: dict[str, int]) -> int | None:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    ends = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((known[end] for end in ends if end in known), None)
