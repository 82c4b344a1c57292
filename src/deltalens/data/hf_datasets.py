"""Datasets of the Hugging Face `datasets` library: saved on a disk with save_to_disk, or by their name on the hub.

The library is an extra (`pip install "deltalens[datasets]"`) and imported only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltalens.data.assemble import assemble
from deltalens.data.csv_table import in_order
from deltalens.data.image_folder import SPLIT_FOLDERS
from deltalens.data.image_items import ImageItems
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

EXPECTED = """expected a folder that datasets.save_to_disk wrote:
    {root}/dataset_dict.json and {root}/train/, test/...    (or dataset_info.json of a single part)
or, with --download true, a name on the hub such as hf/<subset> for a set with subsets"""
IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target")


def recognise(root: Path) -> str | None:
    """ "hf" for what save_to_disk writes."""
    saved = (root / "dataset_dict.json").is_file() or (
        (root / "dataset_info.json").is_file() and (root / "state.json").is_file()
    )
    return "hf" if saved else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "hf"; "hf/<subset>" for a set of the hub that has subsets."""
    found = _load(root, which, options)
    found = found if isinstance(found, Mapping) else {"all": found}
    tables = {_split_name(name): table for name, table in found.items()} if "all" not in found else dict(found)
    if tables.keys() != {"all"} and "train" not in tables:
        raise ValueError(f"{root} has the parts {', '.join(tables)} but no train")
    first = next(iter(tables.values()))
    image, label = _columns(first, root)
    values = {split: table[label] for split, table in tables.items()}
    names, several = _names(first.features[label], [value for each in values.values() for value in each])
    parts = {}
    for split, table in tables.items():
        if all(value == -1 for value in values[split]):
            continue  # a test part whose labels are kept back
        labels = [_label(value, names, several, first.features[label]) for value in values[split]]
        load = _Load(table, image)
        parts[split] = ImageItems([(load, index) for index in range(len(labels))], labels)
    return assemble(parts, names, options, {}, "multilabel" if several else "classification")


class _Load:
    """Row -> image. A class, so that loader processes can be sent it."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = table, column

    def __call__(self, index: int) -> Any:
        return self.table[index][self.column]


def _load(root: Path, which: str, options: ReadOptions) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError('the format hf needs the library datasets: pip install "deltalens[datasets]"') from None
    if root.is_dir():
        if recognise(root) is None:
            raise ValueError(f"{root} was not written by save_to_disk; {EXPECTED.format(root=root)}")
        return datasets.load_from_disk(str(root))
    if not options.download:
        raise FileNotFoundError(f"no data folder at {root}; {EXPECTED.format(root=root)}")
    return datasets.load_dataset(str(root), which or None)


def _split_name(written: str) -> str:
    for split, names in SPLIT_FOLDERS.items():
        if written.lower() in names:
            return split
    return written


def _columns(table: Any, root: Path) -> tuple[str, str]:
    """The columns of the image and of the label, by type, then by name."""
    features = table.features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    images += [name for name in IMAGE_COLUMNS if name in features]
    inner = {name: type(getattr(feature, "feature", None)).__name__ for name, feature in features.items()}
    labels = [name for name in LABEL_COLUMNS if name in features]
    labels += [name for name, kind in kinds.items() if "ClassLabel" in (kind, inner[name])]
    if not images or not labels:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        missing = "labels" if images else "images"
        raise ValueError(f"{root} has no column of {missing}; it has {listed}")
    return images[0], labels[0]


def _names(feature: Any, values: Sequence[Any]) -> tuple[list[str], bool]:
    """(class names, whether a row has several)."""
    several = any(isinstance(value, (list, tuple)) for value in values)
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    if names:
        return list(names), several
    flat = [each for value in values for each in (value if several else [value])]
    return in_order({str(each) for each in flat}), several


def _label(value: Any, names: Sequence[str], several: bool, feature: Any) -> Any:
    numbered = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    index = [int(each) if numbered else names.index(str(each)) for each in (value if several else [value])]
    if not several:
        return index[0]
    label = torch.zeros(len(names), dtype=torch.int8)
    label[index] = 1
    return label
