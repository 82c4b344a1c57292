"""ImageNet and its four variants as CoOp reads them: folders named by WordNet ids, whose names are in `classnames.txt`.

Labels count over the sorted folders that are there. ImageNet-A and -R have 200 of them: their labels are 0 to 199.
"""

from __future__ import annotations

from pathlib import Path

from deltalens.data.coop_lists import Listed, spoken
from deltalens.data.image_folder import ImageFiles, image_files

NAMES = "classnames.txt"


def read_imagenet(folder: Path, file: str, images: str, expected: str, allow_missing: bool = False) -> Listed:
    """`images/train/<wnid>` and `images/val/<wnid>`. The part called val is the test part; there is no other val."""
    names = _class_names(folder, file, expected)
    start = folder / images
    wnids = _folders(start / "train", expected)
    tested = _folders(start / "val", expected)
    if wnids != tested and not (allow_missing and set(tested) <= set(wnids)):
        differing = sorted(set(wnids) ^ set(tested))
        raise ValueError(f"{start}/train and {start}/val have other class folders: {', '.join(differing[:8])}")
    train, test = (_images(start / part, wnids) for part in ("train", "val"))
    return Listed({"train": train, "test": test}, _names_of(wnids, names, start / "train"), start / "train")


def read_wnids(folder: Path, file: str, images: str, expected: str, allow_missing: bool = False) -> Listed:
    """A variant with a folder for each WordNet id: test images only."""
    names = _class_names(folder, file, expected)
    start = folder / images
    wnids = _folders(start, expected)
    return Listed({"test": _images(start, wnids)}, _names_of(wnids, names, start), start)


def read_numbers(folder: Path, file: str, images: str, expected: str, allow_missing: bool = False) -> Listed:
    """ImageNetV2: a folder for each line of `classnames.txt`, by its number from 0. Test images only."""
    names = list(_class_names(folder, file, expected).values())
    start = folder / images
    numbers = set(_folders(start, expected))
    missing = [str(label) for label in range(len(names)) if str(label) not in numbers]
    if missing or len(numbers) != len(names):
        shown = ", ".join((missing or sorted(numbers - {str(label) for label in range(len(names))}))[:8])
        found = "lacks" if missing else "also has"
        raise ValueError(f"{start} {found} the class folders {shown}; {NAMES} has {len(names)} lines; {expected}")
    return Listed({"test": _images(start, [str(label) for label in range(len(names))])}, names, start)


# ------------------------------------------------------------------ details
def _class_names(folder: Path, file: str, expected: str) -> dict[str, str]:
    """WordNet id -> name, in the order of the file: of the dataset's folder, of ImageNet's or of the one above."""
    places = [folder / file, folder.parent / "imagenet" / file, folder.parent / file]
    place = next((each for each in places if each.is_file()), None)
    if place is None:
        raise FileNotFoundError(
            f"no {file} with the names of ImageNet's classes for {folder}: take it from CoOp's DATASETS.md (lines "
            f"`n01440764 tench`), and put it into {folder} or {folder.parent / 'imagenet'}; {expected}"
        )
    names = {}
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        wnid, _, name = line.strip().partition(" ")
        if not wnid:
            continue
        if not name.strip():
            raise ValueError(f"line {number} of {place} is {line!r}, not a WordNet id and a name")
        names[wnid] = spoken(name.strip())
    return names


def _folders(place: Path, expected: str) -> list[str]:
    """The class folders, sorted; files such as README.txt passed over."""
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {place}; {expected}")
    found = sorted(each.name for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not found:
        raise ValueError(f"{place} holds no class folders; {expected}")
    return found


def _names_of(wnids: list[str], names: dict[str, str], place: Path) -> list[str]:
    unknown = [wnid for wnid in wnids if wnid not in names]
    if unknown:
        raise ValueError(f"{place} has {len(unknown)} class folders that {NAMES} does not name: {unknown[0]}")
    return [names[wnid] for wnid in wnids]


def _images(place: Path, classes: list[str]) -> ImageFiles:
    """All images, classes in this order, files of a class sorted."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(place / name)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, labels)
