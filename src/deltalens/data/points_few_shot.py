"""Few-shot folds of clouds, as Point-BERT's authors made them of ModelNet40 and others use them.

    5way_10shot/0.pkl ... 9.pkl = {"train": [(points (n, 3 or more), label, ...), ...], "test": [...]}

Folders may be called 5way10shot, too. Labels are numbered from 0 in each fold; val is split off train by seed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.data.array_pickles import read_arrays
from deltalens.data.assemble import assemble, number_names
from deltalens.data.clouds import CloudArrays
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

NAME = "points-few-shot"
VARIANT = re.compile(r"(\d+)way_?(\d+)shot/(\d+)")
EXPECTED = """expected a fold of few-shot data, named points-few-shot/<way>way_<shot>shot/<fold>:
    {root}/5way_10shot/0.pkl          (or {root}/5way10shot/0.pkl)"""


def recognise(root: Path) -> str | None:
    """ "points-few-shot" for a folder of folds; which of them must be said."""
    folders = [each for each in root.iterdir() if each.is_dir()] if root.is_dir() else []
    there = any(re.fullmatch(r"\d+way_?\d+shot", each.name) and any(each.glob("*.pkl")) for each in folders)
    return NAME if there else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "points-few-shot/5way_10shot/0" and its like."""
    named = VARIANT.fullmatch(which)
    if named is None:
        raise ValueError(f"the format {NAME} wants a fold, got {which!r}; {EXPECTED.format(root=root)}")
    way, shot, fold = map(int, named.groups())
    places = [root / f"{way}way{dash}{shot}shot" / f"{fold}.pkl" for dash in ("_", "")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no file {' or '.join(map(str, places))}; {EXPECTED.format(root=root)}")
    content = read_arrays(file)
    if not isinstance(content, dict) or not {"train", "test"} <= content.keys():
        raise ValueError(f"{file} holds no lists called train and test")
    parts = {part: _clouds(content[part], f"{file.parent.name}/{file.name} {part}") for part in ("train", "test")}
    used = sorted({label for part in parts.values() for label in part.labels})
    names = number_names(used, file)
    for part in parts.values():
        part.labels = [used.index(label) for label in part.labels]
    return assemble(parts, names, options, {"kind": "points"})


def _clouds(items: Any, where: str) -> CloudArrays:
    try:
        clouds = [np.asarray(item[0]) for item in items]
        labels = [int(np.asarray(item[1]).reshape(-1)[0]) for item in items]
    except (TypeError, LookupError, ValueError) as error:
        raise ValueError(f"{where} is no list of (points, label): {error}") from error
    return CloudArrays(clouds, labels, names=[f"{where}[{i}]" for i in range(len(labels))])
