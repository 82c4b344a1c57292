"""ModelNet10 and 40 (Wu et al. 2015) as point clouds: the resampled text files, and the caches that code makes of them.

    modelnet40_normal_resampled/modelnet40_shape_names.txt, modelnet40_train.txt, modelnet40_test.txt
    modelnet40_normal_resampled/airplane/airplane_0001.txt        10,000 rows: x,y,z and the normal
    modelnet40_normal_resampled/modelnet40_train_8192pts_fps.dat  a pickle: [clouds (8192, 6), labels (1,)]

Train and test are official, val is split off train by seed. Normals are dropped.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from deltalens.data.array_pickles import read_arrays
from deltalens.data.assemble import assemble, existing, listed_images, number_names
from deltalens.data.clouds import CloudArrays, CloudFiles, Clouds
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

PARTS = ("train", "test")
VARIANTS = ("txt", "cached")
EXPECTED = """expected the folder modelnet40_normal_resampled:
    {root}/modelnet{classes}_shape_names.txt
    {root}/modelnet{classes}_train.txt, modelnet{classes}_test.txt       names such as airplane_0001
    {root}/<class>/<class>_0001.txt                      rows x,y,z,nx,ny,nz
or caches beside modelnet{classes}_shape_names.txt:
    {root}/modelnet{classes}_train_8192pts_fps.dat, modelnet{classes}_test_8192pts_fps.dat"""


def recognise_modelnet(root: Path, classes: int) -> str | None:
    """ "modelnet40" where the lists or the caches of it are there."""
    listed = all((root / f"modelnet{classes}_{part}.txt").is_file() for part in PARTS)
    return f"modelnet{classes}" if listed or (root.is_dir() and _caches(root, classes)) else None


def read_modelnet(root: Path, which: str, options: ReadOptions, classes: int) -> Splits:
    """Either form of ModelNet with so many classes. which: "txt", "cached", or "" for the caches where they are."""
    refuse_variant(f"modelnet{classes}", which, VARIANTS)
    expected = EXPECTED.format(root=root, classes=classes)
    existing(root, expected)
    caches = _caches(root, classes)
    if which == "cached" and not caches:
        raise FileNotFoundError(f"no caches of modelnet{classes} in {root}; {expected}")
    names = _class_names(root, classes)
    if which == "txt" or not caches:
        parts: dict[str, Clouds] = {part: _listed(root, classes, part, names, expected) for part in PARTS}
        names = names or sorted({path.parent.name for part in PARTS for path in parts[part].paths})  # type: ignore[attr-defined]
    else:
        parts = {part: _cached(file) for part, file in caches.items()}
        labels = [label for part in parts.values() for label in part.labels]
        names = names or number_names(labels, root)
        if labels and not 0 <= min(labels) <= max(labels) < len(names):
            raise ValueError(f"the caches in {root} have labels from {min(labels)} to {max(labels)}, and there are "
                             f"{len(names)} classes")  # fmt: skip
    return assemble(parts, names, options, {"kind": "points"})


def _class_names(root: Path, classes: int) -> list[str]:
    """In the order of the labels; nothing where the list is not there."""
    file = root / f"modelnet{classes}_shape_names.txt"
    return _lines(file) if file.is_file() else []


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _listed(root: Path, classes: int, part: str, names: list[str], expected: str) -> CloudFiles:
    """The text files that a list names: the class is the name without its number."""
    file = root / f"modelnet{classes}_{part}.txt"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; {expected}")
    shapes = _lines(file)
    kinds = [shape.rpartition("_")[0] for shape in shapes]
    known = names or sorted(set(kinds))
    wrong = next((shape for shape, kind in zip(shapes, kinds, strict=True) if kind not in known), None)
    if wrong is not None:
        raise ValueError(f"{file} names {wrong!r}, whose class is not among {', '.join(known[:8])}...; {expected}")
    paths = [root / kind / f"{shape}.txt" for shape, kind in zip(shapes, kinds, strict=True)]
    return CloudFiles(listed_images(paths, file, expected), [known.index(kind) for kind in kinds])


def _caches(root: Path, classes: int) -> dict[str, Path]:
    """Part -> the cache with the most points that both parts have; nothing where there is none."""
    found: dict[str, dict[str, Path]] = {}
    for part in PARTS:
        for file in root.glob(f"modelnet{classes}_{part}_*pts*.dat"):
            found.setdefault(file.name.removeprefix(f"modelnet{classes}_{part}_"), {})[part] = file
    both = [kind for kind, files in found.items() if len(files) == len(PARTS)]
    return found[max(both, key=_points_of)] if both else {}


def _points_of(kind: str) -> tuple[int, str]:
    return int(re.match(r"\d*", kind).group() or 0), kind  # type: ignore[union-attr]


def _cached(file: Path) -> CloudArrays:
    content = read_arrays(file)
    if not (isinstance(content, (list, tuple)) and len(content) == 2 and len(content[0]) == len(content[1])):
        raise ValueError(f"{file} holds no two lists, one of clouds and one of as many labels")
    clouds = [np.asarray(cloud)[..., :3] for cloud in content[0]]
    labels = [int(np.asarray(label).reshape(-1)[0]) for label in content[1]]
    return CloudArrays(clouds, labels, names=[f"{file.name}[{i}]" for i in range(len(labels))])
