"""The classification sets of torchvision, with their official splits; fetched only when asked.

    torchvision/Flowers102, torchvision/OxfordIIITPet, torchvision/CIFAR100, ...

Where a set has no validation part, it is split off train by seed; where it has no parts at all, all three are drawn.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltalens.data.assemble import assemble, existing
from deltalens.data.image_items import ImageItems
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

THREE: dict[str, dict[str, Any]] = {part: {"split": part} for part in ("train", "val", "test")}
TWO: dict[str, dict[str, Any]] = {part: {"split": part} for part in ("train", "test")}
FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
WHOLE: dict[str, dict[str, Any]] = {"all": {}}
LABELLED_VAL = {
    "train": {"split": "train"},
    "test": {"split": "val"},
}  # the part called val is the one that is reported

SETS: dict[str, Mapping[str, dict[str, Any]]] = {
    "CIFAR10": FLAG,
    "CIFAR100": FLAG,
    "Caltech101": WHOLE,
    "Caltech256": WHOLE,
    "Country211": {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    "DTD": THREE,
    "EuroSAT": WHOLE,
    "FER2013": TWO,
    "FGVCAircraft": THREE,
    "FashionMNIST": FLAG,
    "Flowers102": THREE,
    "Food101": TWO,
    "GTSRB": TWO,
    "ImageNet": LABELLED_VAL,
    "Imagenette": LABELLED_VAL,
    "KMNIST": FLAG,
    "MNIST": FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "PCAM": THREE,
    "RenderedSST2": THREE,
    "SEMEION": WHOLE,
    "STL10": TWO,
    "SUN397": WHOLE,
    "SVHN": TWO,
    "StanfordCars": TWO,
    "USPS": FLAG,
}


def recognise(root: Path) -> str | None:
    """None: torchvision's folders do not say which set they are."""
    return None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "torchvision/<Name>". root: the folder that torchvision's class gets."""
    if which not in SETS:
        near = difflib.get_close_matches(which, SETS, n=2) or list(SETS)
        raise ValueError(f"unknown torchvision set {which!r}; write torchvision/<Name> with {' or '.join(near)}")
    if not options.download:
        existing(root, f"torchvision's folder for {which}; --download true fetches it")
    parts, datasets = {}, []
    for split, arguments in SETS[which].items():
        dataset = _open(which, root, arguments, options.download)
        order = _order(dataset)
        labels = _labels(dataset)
        datasets.append(dataset)
        parts[split] = ImageItems([(_load(dataset), index) for index in order], [labels[index] for index in order])
    count = 1 + max(label for part in parts.values() for label in part.labels)
    return assemble(parts, _names(datasets[0], count), options, {})


class _load:
    """Item -> image, of a dataset whose items are (image, label). A class, so that loader processes can be sent it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        return self.dataset[index][0]


def _open(name: str, root: Path, arguments: Mapping[str, Any], download: bool) -> Any:
    import inspect

    import torchvision

    kind = getattr(torchvision.datasets, name)
    keywords = dict(arguments)
    if download and "download" in inspect.signature(kind.__init__).parameters:
        keywords["download"] = True
    try:
        return kind(root, **keywords)
    except (RuntimeError, ValueError, FileNotFoundError, NotADirectoryError) as error:
        hint = "" if download else "; --download true fetches it, where torchvision can"
        raise ValueError(f"torchvision finds no {name} in {root}: {error}{hint}") from error


def _labels(dataset: Any) -> list[int]:
    """All labels, without decoding images where the set keeps them in a list."""
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, name):
            return [int(label) for label in getattr(dataset, name)]
    samples = getattr(dataset, "_samples", None)
    if samples is not None:
        return [int(label) for _, label in samples]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _order(dataset: Any) -> list[int]:
    """Of a set that lists its files as the file system gives them (SUN397), sorted, so that a split is the same
    everywhere; of the others as it is."""
    files = getattr(dataset, "_image_files", None)
    if type(dataset).__name__ == "SUN397" and files is not None:
        return sorted(range(len(files)), key=lambda index: str(files[index]))
    return list(range(len(dataset)))


def _names(dataset: Any, count: int) -> list[str]:
    """The set's own class names, or numbers. ImageNet has several for a class: the first."""
    for attribute in ("classes", "categories"):
        names = getattr(dataset, attribute, None)
        if names is not None and len(names) >= count:
            found = [name if isinstance(name, str) else name[0] for name in names]
            return found if len(set(found)) == len(found) else [f"{i} {name}" for i, name in enumerate(found)]
    return [str(number) for number in range(count)]
