"""The format "masks": pictures and one-channel masks, paired by a manifest.csv or by their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltalens.data.assemble import existing, listed_images
from deltalens.data.class_lists import class_list
from deltalens.data.image_folder import EXTENSIONS, SPLIT_FOLDERS, image_files
from deltalens.data.mask_parts import Meaning, Pair, mask_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits
from deltalens.data.tables import PATH_COLUMNS, SPLIT_COLUMNS, Table, image_paths, read_table

NAME = "masks"
EXPECTED = """expected in {root} pictures and masks, whose values number the classes from 0 (255: ignored), of one name:
    images/train/a.jpg      masks/train/a.png       (masks, labels or annotations; val and test may be absent;
                                                     without train all are drawn by seed)
or by a table with columns for the picture, the mask and the split:
    manifest.csv            split,image,mask
with the names of the classes in info.json ({{"classes": [...], "ignore_index": 255}}) or classes.txt"""
MASK_FOLDERS = ("masks", "labels", "annotations", "segmentations", "semantic")
MASK_COLUMNS = ("mask", "semantic_label", "segmentation", "label", "annotation", "semantic", "mask_path", "label_path")
MASK_FILES = {".png", ".tif", ".tiff", ".bmp", ".gif"}
ENDS = ("", "_mask", "_label", "_labels", "_seg")


def tasks(root: Path) -> tuple[str, ...]:
    """("segmentation",) where `root` is laid out so, otherwise ()."""
    if not root.is_dir():
        return ()
    table = _table(root)
    if table is not None:
        return ("segmentation",)
    found = folders(root)
    return ("segmentation",) if found and all(_first_is_mask(masks) for _, masks in found.values()) else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "masks" of `deltalens.data.read_data`, task "segmentation".

    Class names are those of info.json or classes.txt, of which "void" and its like are ignored; otherwise numbers, as
    far as the highest value of the masks. Raises FileNotFoundError or ValueError with the expected tree for another
    layout and for pictures without a mask, ValueError as `mask_splits` has them.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    table = _table(existing(root, expected))
    listed = class_list(root, ("semantic_classes", "classes", "class_names", "names"))
    meaning = None if listed is None else Meaning.of_list(listed, options.ignore_index)
    if table is not None:
        return mask_splits(_parts_of_table(table, expected), meaning, options)
    found = folders(root)
    if not found:
        raise ValueError(f"{root} has no folders of pictures and of masks; {expected}")
    if "train" not in found and "all" not in found:
        raise ValueError(f"{root} has {', '.join(found)} but no train; {expected}")
    parts = {part: _paired(pictures, masks, expected) for part, (pictures, masks) in found.items()}
    return mask_splits(parts, meaning, options)


def folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """part -> folders of pictures and of masks; "all" where there are no parts."""
    found: dict[str, tuple[Path, Path]] = {}
    for kind in MASK_FOLDERS:
        for part, synonyms in SPLIT_FOLDERS.items():
            for name in synonyms:
                for pictures, masks in (
                    (root / "images" / name, root / kind / name),
                    (root / name / "images", root / name / kind),
                ):
                    if pictures.is_dir() and masks.is_dir():
                        found.setdefault(part, (pictures, masks))
        if not found and (root / "images").is_dir() and (root / kind).is_dir():
            return {"all": (root / "images", root / kind)}
    return found


def _table(root: Path) -> Table | None:
    """manifest.csv where it names pictures and, in another column, mask files."""
    file = root / "manifest.csv"
    if not file.is_file():
        return None
    try:
        table = read_table(file, "")
    except ValueError:
        return None
    column = table.column(MASK_COLUMNS)
    if column is None or table.column(PATH_COLUMNS) is None:
        return None
    first = table.folder / table.rows[0][column]
    return table if first.suffix.lower() in MASK_FILES and first.is_file() else None


def _parts_of_table(table: Table, expected: str) -> dict[str, list[Pair]]:
    column = table.column(MASK_COLUMNS)
    masks = listed_images([table.folder / row[column] for row in table.rows], table.place, expected)  # type: ignore[index]
    pairs = list(zip(image_paths(table, expected), masks, strict=True))
    if table.splits is None:
        return {"all": pairs}
    if "train" not in table.splits:
        raise ValueError(
            f"{table.place} has the {SPLIT_COLUMNS[0]}s {', '.join(sorted(set(table.splits)))} but no train"
        )
    parts = {part: [pair for pair, of in zip(pairs, table.splits, strict=True) if of == part] for part in SPLIT_FOLDERS}
    return {part: each for part, each in parts.items() if each}


def _first_is_mask(folder: Path) -> bool:
    first = next((path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")), None)
    return first is not None and first.suffix.lower() in MASK_FILES


def _paired(pictures: Path, masks: Path, expected: str) -> list[Pair]:
    """Every picture with the mask of the same path below its folder. ValueError names pictures without one."""
    files = image_files(pictures)
    if not files:
        raise ValueError(f"{pictures} holds no images ({', '.join(sorted(EXTENSIONS))}); {expected}")
    return pair_files(files, pictures, masks, image_files(masks), ENDS, expected)


def pair_files(
    files: Sequence[Path], pictures: Path, masks: Path, mask_files: Sequence[Path], ends: Sequence[str], expected: str
) -> list[Pair]:
    """(picture, mask) where the mask's path below `masks` is the picture's with one of `ends` before the extension."""
    by_name = {path.relative_to(masks).with_suffix("").as_posix(): path for path in mask_files}
    pairs, lonely = [], []
    for path in files:
        name = path.relative_to(pictures).with_suffix("").as_posix()
        mask = next((by_name[name + end] for end in ends if name + end in by_name), None)
        if mask is None:
            lonely.append(str(path))
        else:
            pairs.append((path, mask))
    if lonely:
        raise ValueError(f"{len(lonely)} of {len(files)} pictures have no mask in {masks}: {lonely[0]}; {expected}")
    return pairs
