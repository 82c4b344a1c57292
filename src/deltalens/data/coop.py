"""The datasets of CoOp and its successors, in the layout of CoOp's DATASETS.md, with their few-shot splits.

Eleven datasets, and four variants of ImageNet that have test images only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deltalens.data.assemble import Images, existing, listed_images
from deltalens.data.coop_imagenet import NAMES, read_imagenet, read_numbers, read_wnids
from deltalens.data.coop_lists import Listed, read_aircraft, read_split_file
from deltalens.data.image_folder import ImageFiles, without_broken
from deltalens.data.options import ReadOptions
from deltalens.data.selection import few_shot_parts, subset_parts
from deltalens.data.splits import Splits
from deltalens.data.stored_shots import stored_part

EXPECTED = """expected the layout of CoOp's DATASETS.md, where --data is {root} or {folder}:
    {folder}/{file}
    {folder}/{images}..."""
LARGE = 100_000  # images of a part that are not decoded before they are needed: the training part of ImageNet
GENERIC = "expected one file split_zhou_<name>.json in {root}, and beside it the images that it lists"


class Set(NamedTuple):
    """read: the reader. file: what names its classes. images: the folder of images. sizes: published numbers of train,
    val and test images. order: the stored list of all training images, where the order of files is not published."""

    read: Callable[[Path, str, str, str, bool], Listed]
    file: str
    images: str
    sizes: tuple[int, int, int]
    order: str = ""


SETS = {
    "imagenet": Set(read_imagenet, NAMES, "images", (1281167, 0, 50000), "preprocessed.pkl"),
    "caltech-101": Set(read_split_file, "split_zhou_Caltech101.json", "101_ObjectCategories", (4128, 1649, 2465)),
    "oxford_pets": Set(read_split_file, "split_zhou_OxfordPets.json", "images", (2944, 736, 3669)),
    "stanford_cars": Set(read_split_file, "split_zhou_StanfordCars.json", "", (6509, 1635, 8041)),
    "oxford_flowers": Set(read_split_file, "split_zhou_OxfordFlowers.json", "jpg", (4093, 1633, 2463)),
    "food-101": Set(read_split_file, "split_zhou_Food101.json", "images", (50500, 20200, 30300)),
    "fgvc_aircraft": Set(read_aircraft, "variants.txt", "images", (3334, 3333, 3333)),
    "sun397": Set(read_split_file, "split_zhou_SUN397.json", "SUN397", (15880, 3970, 19850)),
    "dtd": Set(read_split_file, "split_zhou_DescribableTextures.json", "images", (2820, 1128, 1692)),
    "eurosat": Set(read_split_file, "split_zhou_EuroSAT.json", "2750", (13500, 5400, 8100)),
    "ucf101": Set(read_split_file, "split_zhou_UCF101.json", "UCF-101-midframes", (7639, 1898, 3783)),
    "imagenetv2": Set(read_numbers, NAMES, "imagenetv2-matched-frequency-format-val", (0, 0, 10000)),
    "imagenet-sketch": Set(read_wnids, NAMES, "images", (0, 0, 50889)),
    "imagenet-adversarial": Set(read_wnids, NAMES, "imagenet-a", (0, 0, 7500)),
    "imagenet-rendition": Set(read_wnids, NAMES, "imagenet-r", (0, 0, 30000)),
}
ALIASES = {
    "caltech101": "caltech-101",
    "caltech_101": "caltech-101",
    "oxfordpets": "oxford_pets",
    "pets": "oxford_pets",
    "stanfordcars": "stanford_cars",
    "cars": "stanford_cars",
    "oxfordflowers": "oxford_flowers",
    "flowers": "oxford_flowers",
    "flowers102": "oxford_flowers",
    "food101": "food-101",
    "food_101": "food-101",
    "fgvcaircraft": "fgvc_aircraft",
    "aircraft": "fgvc_aircraft",
    "describabletextures": "dtd",
    "imagenet_sketch": "imagenet-sketch",
    "imagenetsketch": "imagenet-sketch",
    "imagenet_a": "imagenet-adversarial",
    "imagenet-a": "imagenet-adversarial",
    "imagenet_adversarial": "imagenet-adversarial",
    "imagenet_r": "imagenet-rendition",
    "imagenet-r": "imagenet-rendition",
    "imagenet_rendition": "imagenet-rendition",
}


def set_name(written: str) -> str | None:
    """The dataset's folder name from that or from a usual other one; None for what is no dataset of CoOp's."""
    plain = written.strip().lower()
    plain = ALIASES.get(plain, plain)
    return plain if plain in SETS else None


def recognise(root: Path) -> str | None:
    """ "coop/<dataset>" for a dataset's own folder, "coop" for one with another `split_zhou_*.json`."""
    files = _split_files(root)
    if len(files) == 1:
        known = next((name for name, each in SETS.items() if each.file == files[0].name), None)
        return f"coop/{known}" if known else "coop"
    if (root / "variants.txt").is_file() and (root / "images_variant_train.txt").is_file():
        return "coop/fgvc_aircraft"
    name = set_name(root.name)
    named = name is not None and SETS[name].file == NAMES and (root / SETS[name].images).is_dir()
    return f"coop/{name}" if named else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The formats "coop/<dataset>", where root is the folder of all datasets or of this one, and "coop", where it is a
    folder with one `split_zhou_*.json`."""
    folder, known, expected = _dataset(root, which) if which else _only_split_file(root)
    listed = known.read(folder, known.file, known.images, expected, options.allow_missing_classes)
    sizes = tuple(len(listed.parts.get(part, ())) for part in ("train", "val", "test"))
    origin: dict[str, Any] = {"published_sizes": sizes == known.sizes} if which else {}
    parts, facts = _shots(folder, known, listed, options)
    parts, names, more = subset_parts(parts, listed.class_names, options.subset)
    checked = {
        part: _checked(images, folder / known.file, expected, options) if len(images) <= LARGE else images
        for part, images in parts.items()
    }
    val, test = (checked[part] if checked.get(part) else None for part in ("val", "test"))
    return Splits(checked.get("train", ImageFiles([], [])), val, names, test, origin | facts | more)


# ------------------------------------------------------------------ details
def _split_files(root: Path) -> list[Path]:
    return sorted(root.glob("split_zhou_*.json")) if root.is_dir() else []


def _dataset(root: Path, which: str) -> tuple[Path, Set, str]:
    """(folder, what is known of it, the expected tree) of "coop/<dataset>"."""
    name = set_name(which)
    if name is None:
        raise ValueError(f"{which!r} is no dataset of CoOp's; write coop/<dataset> with {', '.join(SETS)}")
    known = SETS[name]
    own = set_name(root.name) == name or ((root / known.file).is_file() and (root / known.images).is_dir())
    folder = root if own else root / name
    if not own and not folder.is_dir() and root.is_dir():
        named = sorted(each for each in root.iterdir() if each.is_dir() and set_name(each.name) == name)
        folder = named[0] if named else folder
    images = f"{known.images}/" if known.images else ""
    expected = EXPECTED.format(root=folder.parent, folder=folder, file=known.file, images=images)
    return existing(folder, expected), known, expected


def _only_split_file(root: Path) -> tuple[Path, Set, str]:
    expected = GENERIC.format(root=root)
    files = _split_files(existing(root, expected))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{root} has {len(files)} files split_zhou_*.json ({found}); {expected}")
    return root, Set(read_split_file, files[0].name, "", (0, 0, 0)), expected


def _checked(images: Images, file: Path, expected: str, options: ReadOptions) -> Images:
    assert isinstance(images, ImageFiles)
    listed_images(images.paths, file, expected)
    return without_broken(images, options.skip_broken)


def _shots(folder: Path, known: Set, listed: Listed, options: ReadOptions) -> tuple[dict[str, Images], dict[str, Any]]:
    """Few-shot parts: those of a stored split where there is one, drawn otherwise."""
    parts: dict[str, Images] = dict(listed.parts)
    sampled = [part for part in ("train", "val") if part in parts]
    if options.shots is None or "train" not in parts:
        return parts, {}
    stored = Path("split_fewshot", f"shot_{options.shots}-seed_{options.sampling_seed}.pkl")
    if options.stored_shots and (folder / stored).is_file():
        for part in sampled:
            parts[part] = stored_part(folder / stored, part, listed.parts[part], listed.start)
        facts = {"shots": options.shots, "shots_seed": options.sampling_seed, "shots_from": stored.as_posix()}
        return parts, facts
    ordered = options.stored_shots and bool(known.order) and (folder / known.order).is_file()
    if ordered:
        parts["train"] = stored_part(folder / known.order, "train", listed.parts["train"], listed.start)
    parts, facts = few_shot_parts(parts, options)
    return parts, facts | ({"shots_from": f"drawn in the order of {known.order}"} if ordered else {})
