"""The five fine-grained sets of VPT's FGVC benchmark, by VPT's JSON splits or by the lists the sets come with.

VPT's files map image paths to class numbers; train and val are there a random 90 and 10 per cent of the official
training part. Without them, official lists are read and val is split off train by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltalens.data.assemble import assemble, existing, listed_images
from deltalens.data.image_folder import ImageFiles
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

EXPECTED = """expected VPT's splits beside the images:
    {root}/train.json, val.json, test.json           ({{"relative/path.jpg": 17, ...}})
    {root}/%s
or the set's own lists:
    %s"""


class Set(NamedTuple):
    """images: the folder that paths start from. own: the files the set comes with. sizes: train, val, test in VPT."""

    images: str
    own: tuple[str, ...]
    sizes: tuple[int, int, int]


BIRD_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
SETS = {
    "cub": Set("images", BIRD_LISTS, (5394, 600, 5794)),
    "nabirds": Set("images", BIRD_LISTS, (21536, 2393, 24633)),
    "flowers": Set("jpg", ("setid.mat", "imagelabels.mat"), (1020, 1020, 6149)),
    "dogs": Set("Images", ("train_list.mat", "test_list.mat"), (10800, 1200, 8580)),
    "cars": Set("", (), (7329, 815, 8041)),
}
ALIASES = {
    "cub_200_2011": "cub",
    "cub200": "cub",
    "oxfordflower": "flowers",
    "oxfordflowers": "flowers",
    "flowers102": "flowers",
    "stanford_dogs": "dogs",
    "stanforddogs": "dogs",
    "stanford_cars": "cars",
    "stanfordcars": "cars",
}


def set_name(written: str) -> str | None:
    """The set's name from that or from a usual folder name."""
    plain = written.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return plain if plain in SETS else None


def recognise(root: Path) -> str | None:
    """ "fgvc/<set>" for VPT's JSON files in a folder named like the set, or for a set's own lists."""
    by_name = set_name(root.name)
    if by_name and all((root / f"{split}.json").is_file() for split in ("train", "val", "test")):
        return f"fgvc/{by_name}"
    for name in ("cub", "flowers", "dogs"):
        if all((root / file).is_file() for file in SETS[name].own):
            return f"fgvc/{by_name if by_name == 'nabirds' else name}"
    return None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "fgvc/<set>". root: the set's folder."""
    name = set_name(which or root.name)
    if name is None:
        raise ValueError(f"{which or root.name!r} is no set of FGVC; write fgvc/<set> with {', '.join(SETS)}")
    known = SETS[name]
    own = ", ".join(known.own) or "none that is read here; torchvision/StanfordCars reads the devkit"
    expected = EXPECTED.format(root=root) % (f"{known.images}/..." if known.images else "...", own)
    existing(root, expected)
    origin: dict[str, Any] = {}
    if (root / "train.json").is_file():
        parts, names = _read_json(root, known, expected)
        origin["splits"] = "VPT's"
    elif known.own and all((root / file).is_file() for file in known.own):
        reader = {"flowers": _read_flowers, "dogs": _read_dogs}.get(name, _read_birds)
        parts, names = reader(root)
        origin["splits"] = "official"
    else:
        raise ValueError(f"{root} holds neither VPT's splits nor the lists of {name}; {expected}")
    for split, images in parts.items():
        listed_images(images.paths, root / split, expected)
    splits = assemble(parts, names, options, origin)
    sizes = tuple(len(part) for part in (splits.train, splits.val, splits.test or ()))
    splits.origin["published_sizes"] = sizes == known.sizes
    return splits


# ------------------------------------------------------------------ VPT's splits
def _read_json(root: Path, known: Set, expected: str) -> tuple[dict[str, ImageFiles], list[str]]:
    missing = [split for split in ("train", "val", "test") if not (root / f"{split}.json").is_file()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(f'{split}.json' for split in missing)}; {expected}")
    lists = {split: _json_list(root / f"{split}.json") for split in ("train", "val", "test")}
    first = next(iter(lists["train"]))
    start = next((place for place in (root / known.images, root) if (place / first).is_file()), root / known.images)
    numbers = sorted({number for each in lists.values() for number in each.values()})
    index = {number: i for i, number in enumerate(numbers)}
    parts = {
        split: ImageFiles([start / path for path in each], [index[number] for number in each.values()])
        for split, each in lists.items()
    }
    folders: dict[int, set[str]] = {}
    for each in lists.values():
        for path, number in each.items():
            folders.setdefault(number, set()).add(Path(path).parent.name)
    return parts, _folder_names([folders[number] for number in numbers], numbers)


def _json_list(file: Path) -> dict[str, int]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content or not all(isinstance(n, int) for n in content.values()):
        raise ValueError(f"{file} is no mapping of image paths to class numbers")
    return content


def _folder_names(folders: Sequence[set[str]], numbers: Sequence[int]) -> list[str]:
    """The classes' folders as their names, where each class has one of its own; else the numbers."""
    names = [next(iter(each)) for each in folders]
    own = all(len(each) == 1 for each in folders) and len(set(names)) == len(names) and all(names)
    return names if own else [str(number) for number in numbers]


# ------------------------------------------------------------------ the sets' own lists
def _read_birds(root: Path) -> tuple[dict[str, ImageFiles], list[str]]:
    """CUB-200-2011 and NABirds: `<image id> <value>` per line in three files."""
    paths, classes, trained = (_pairs(root / name) for name in BIRD_LISTS[:3])
    names = _pairs(root / BIRD_LISTS[3])
    used = sorted(set(classes.values()), key=int)  # NABirds lists the whole tree of birds, and uses its leaves
    parts = {}
    for split, flag in (("train", "1"), ("test", "0")):
        chosen = [image for image in paths if trained[image] == flag]
        parts[split] = ImageFiles(
            [root / "images" / paths[image] for image in chosen], [used.index(classes[image]) for image in chosen]
        )
    found = [names.get(number, number) for number in used]
    return parts, found if len(set(found)) == len(found) else used


def _pairs(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())


def _read_dogs(root: Path) -> tuple[dict[str, ImageFiles], list[str]]:
    """Stanford Dogs: train_list.mat and test_list.mat with file_list and labels from 1."""
    from scipy.io import loadmat

    lists = {}
    for split in ("train", "test"):
        content = loadmat(root / f"{split}_list.mat", squeeze_me=True)
        labels = [int(label) - 1 for label in np.atleast_1d(content["labels"])]
        lists[split] = ([str(path) for path in np.atleast_1d(content["file_list"])], labels)
    folders: dict[int, set[str]] = {}
    for paths, labels in lists.values():
        for path, label in zip(paths, labels, strict=True):
            folders.setdefault(label, set()).add(Path(path).parent.name)
    numbers = list(range(max(folders) + 1))
    names = _folder_names([folders.get(number, {str(number)}) for number in numbers], numbers)
    parts = {
        split: ImageFiles([root / "Images" / path for path in paths], labels)
        for split, (paths, labels) in lists.items()
    }
    return parts, names


def _read_flowers(root: Path) -> tuple[dict[str, ImageFiles], list[str]]:
    """Oxford Flowers 102: setid.mat (trnid, valid, tstid, from 1) and imagelabels.mat (labels from 1)."""
    from scipy.io import loadmat

    ids = loadmat(root / "setid.mat", squeeze_me=True)
    labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]
    labels = np.atleast_1d(labels)
    parts = {}
    for split, key in {"train": "trnid", "val": "valid", "test": "tstid"}.items():
        numbers = [int(number) for number in np.atleast_1d(ids[key])]
        paths = [root / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
        parts[split] = ImageFiles(paths, [int(labels[number - 1]) - 1 for number in numbers])
    return parts, [str(number) for number in range(1, int(labels.max()) + 1)]
