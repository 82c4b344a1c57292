"""Folders of point clouds, one folder per class, split or not: .npy, .npz, .ply, .off, .xyz, .txt, .pts."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.assemble import assemble, existing
from deltalens.data.cloud_files import EXTENSIONS, cloud_files, is_cloud_file
from deltalens.data.clouds import CloudFiles, Clouds
from deltalens.data.image_folder import check_same_classes, class_folders, split_folders
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

NAME = "points-folder"
EXPECTED = """expected one folder per class, either split already:
    {root}/train/<class>/*.ply       (val and test may be absent)
or not split yet:
    {root}/<class>/*.ply
with files of {kinds}; or, as ModelNet has it, {root}/<class>/train/*.off and {root}/<class>/test/*.off"""
INSIDE = ("train", "test")  # folders inside those of the classes


def recognise(root: Path) -> str | None:
    """ "points-folder" where the first file in every class folder is one that holds a cloud."""
    if not root.is_dir():
        return None
    folders = split_folders(root)
    start = folders.get("train", root)
    if folders and "train" not in folders:
        return None
    classes = class_folders(start)
    return NAME if len(classes) > 1 and all(_begins_with_cloud(start / name) for name in classes) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "points-folder" of `deltalens.data.read_data`. Class names are the sorted names of train's folders.

    A missing val is split off train by seed, and class folders without train and test are split into all three. Raises
    FileNotFoundError for a missing folder, ValueError for folders without clouds or that differ between parts.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root, kinds=", ".join(sorted(EXTENSIONS)))
    folders = split_folders(existing(root, expected))
    if folders and "train" not in folders:
        raise ValueError(f"{root} has {', '.join(folders)} but no train folder; {expected}")
    if folders:
        check_same_classes(folders, options.allow_missing_classes)
    names = class_folders(folders.get("train", root))
    if not names:
        raise ValueError(f"{root} holds no class folders; {expected}")
    found = {part: _clouds(folder, names, expected) for part, folder in (folders or {"all": root}).items()}
    if "all" in found and _split_inside(root, names):
        found = {part: _inside(found["all"], root, part) for part in INSIDE}
    parts: dict[str, Clouds] = {part: clouds for part, clouds in found.items() if len(clouds)}
    return assemble(parts, names, options, {"kind": "points"})


def _clouds(folder: Path, names: list[str], expected: str) -> CloudFiles:
    paths, labels, empty = [], [], []
    for label, name in enumerate(names):
        files = cloud_files(folder / name) if (folder / name).is_dir() else []
        paths += files
        labels += [label] * len(files)
        if not files and (folder / name).is_dir():
            empty.append(name)
    if empty:
        raise ValueError(f"class folders without clouds in {folder}: {', '.join(empty[:8])}; {expected}")
    return CloudFiles(paths, labels)


def _split_inside(root: Path, names: list[str]) -> bool:
    return all((root / name / "train").is_dir() and (root / name / "test").is_dir() for name in names)


def _inside(clouds: CloudFiles, root: Path, part: str) -> CloudFiles:
    """Those whose path goes on with that part behind the class."""
    return clouds.subset([i for i, path in enumerate(clouds.paths) if path.relative_to(root).parts[1] == part])


def _begins_with_cloud(folder: Path) -> bool:
    """Whether the first file below a folder is one; without walking through all of them."""
    for each in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if each.name.startswith("."):
            continue
        if each.is_file():
            return is_cloud_file(each.name)
        if any(each.iterdir()):
            return _begins_with_cloud(each)
    return False
