"""Miniatures of CoOp's datasets in the layout of its DATASETS.md, and its pickles, made without Dassl."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType

from test_formats import picture

PARTS = {"train": 5, "val": 3, "test": 2}


def write_split_file(folder: Path, file: str, images: str, names=("ant_eater", "Big Cat", "cow"), flat=False) -> Path:
    """A dataset with `split_zhou_*.json`: 5, 3 and 2 images of every class, classes in turns."""
    lists: dict[str, list] = {}
    for part, count in PARTS.items():
        lists[part] = []
        for i in range(count):
            for label, name in enumerate(names):
                path = f"{part}_{label}_{i}.jpg" if flat else f"{name.replace(' ', '')}/{part}{i}.jpg"
                picture(folder / images / path, i)
                lists[part].append([path, label, name])
    (folder / file).write_text(json.dumps(lists))
    return folder


def write_aircraft(folder: Path) -> Path:
    variants = ["707-320", "Spitfire", "Cessna 172"]
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    number = 0
    for part, count in PARTS.items():
        lines = []
        for variant in variants * count:
            number += 1
            picture(folder / f"images/{number:07d}.jpg", number)
            lines.append(f"{number:07d} {variant}")
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark", "n01491361": "tiger_shark"}


def write_class_names(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items()))
    return folder


def write_imagenet(folder: Path, count: int = 6) -> Path:
    write_class_names(folder)
    for wnid in WNIDS:
        for i in range(count):
            picture(folder / f"images/train/{wnid}/{wnid}_{i}.JPEG", i)
        picture(folder / f"images/val/{wnid}/ILSVRC2012_val_{wnid}.JPEG")
    return folder


def write_pickle(file: Path, lists: dict[str, list[tuple[str, int, str]]], attributes: bool = True) -> Path:
    """What CoOp's code stores: objects of Dassl's class Datum. (path, label, class name) of every item."""
    names = ["dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset"]
    modules = {name: ModuleType(name) for name in names}
    datum = type("Datum", (), {"__module__": names[-1], "__qualname__": "Datum"})
    modules[names[-1]].Datum = datum  # type: ignore[attr-defined]

    def item(path, label, name):
        made = datum()
        if attributes:
            made.__dict__.update(_impath=path, _label=label, _domain=0, _classname=name)
        return made

    content = {part: [item(*each) for each in items] for part, items in lists.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.modules.update(modules)
    try:
        file.write_bytes(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))
    finally:
        for name in names:
            del sys.modules[name]
    return file
