"""VTAB-1k (Zhai et al. 2019): 19 tasks of 800 training and 200 validation images, as text lists beside the images.

The lists are those that NOAH, FacT, SSF, V-PETL Bench and others pass around: `<path> <label>` per line. The labels are
numbers, and so are the class names.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from deltalens.data.assemble import assemble, existing, listed_images
from deltalens.data.image_folder import ImageFiles, image_files
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

EXPECTED = """expected the text lists of a task:
    {root}/train800.txt, val200.txt, test.txt        (lines: images/train/0001.jpg 23)
    {root}/train800val200.txt, test.txt              (the first 800 lines train, the others val)
    {root}/images/...
or folders of exported images, one per class number:
    {root}/train800/<label>/*.png, val200/<label>/*.png, test/<label>/*.png"""
TRAIN = 800
GROUPS = ("Natural", "Specialized", "Structured")


class Task(NamedTuple):
    group: str
    classes: int
    test: int


TASKS = {
    "cifar": Task("Natural", 100, 10000),
    "caltech101": Task("Natural", 102, 6084),
    "dtd": Task("Natural", 47, 1880),
    "oxford_flowers102": Task("Natural", 102, 6149),
    "oxford_iiit_pet": Task("Natural", 37, 3669),
    "svhn": Task("Natural", 10, 26032),
    "sun397": Task("Natural", 397, 21750),
    "patch_camelyon": Task("Specialized", 2, 32768),
    "eurosat": Task("Specialized", 10, 5400),
    "resisc45": Task("Specialized", 45, 6300),
    "diabetic_retinopathy": Task("Specialized", 5, 42670),
    "clevr_count": Task("Structured", 8, 15000),
    "clevr_dist": Task("Structured", 6, 15000),
    "dmlab": Task("Structured", 6, 22735),
    "kitti": Task("Structured", 4, 711),
    "dsprites_loc": Task("Structured", 16, 73728),
    "dsprites_ori": Task("Structured", 16, 73728),
    "smallnorb_azi": Task("Structured", 18, 12150),
    "smallnorb_ele": Task("Structured", 9, 12150),
}
ALIASES = {
    "cifar100": "cifar",
    "cifar_100": "cifar",
    "caltech": "caltech101",
    "caltech_101": "caltech101",
    "flowers102": "oxford_flowers102",
    "flowers": "oxford_flowers102",
    "oxford_flowers": "oxford_flowers102",
    "pets": "oxford_iiit_pet",
    "pet": "oxford_iiit_pet",
    "svhn_cropped": "svhn",
    "sun": "sun397",
    "camelyon": "patch_camelyon",
    "pcam": "patch_camelyon",
    "resisc": "resisc45",
    "retinopathy": "diabetic_retinopathy",
    "clevr_distance": "clevr_dist",
    "kitti_dist": "kitti",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}


def task_name(written: str) -> str | None:
    """The task's name in the lists of NOAH, from that or from a usual other one; None for what is no task."""
    plain = written.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return plain if plain in TASKS else None


def task_of(format: str, root: Path | str) -> str | None:
    """The task that a format (or "auto") reads at a root, None where it is no VTAB-1k task."""
    name, _, which = format.partition("/")
    if name == "vtab1k" and which:
        return task_name(which)
    if name == "vtab1k" or (format == "auto" and recognise(Path(root).expanduser())):
        return task_name(Path(root).expanduser().name)
    return None


def recognise(root: Path) -> str | None:
    """ "vtab1k/<task>" for a folder of that name that holds the lists."""
    lists = (root / "train800val200.txt").is_file() or (root / "train800.txt").is_file()
    name = task_name(root.name)
    return f"vtab1k/{name}" if lists and name else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "vtab1k/<task>". root: the folder of the tasks, or of this one."""
    name = task_name(which or root.name)
    if name is None:
        raise ValueError(f"{which or root.name!r} is no task of VTAB-1k; write vtab1k/<task> with {', '.join(TASKS)}")
    folder = _task_folder(root, name)
    parts = _read_lists(folder) if (folder / "test.txt").is_file() else _read_folders(folder)
    known = TASKS[name]
    for split, images in parts.items():
        wrong = [label for label in images.labels if not 0 <= label < known.classes]
        if wrong:
            raise ValueError(
                f"{folder} has the label {wrong[0]} in {split}; {name} has labels 0 to {known.classes - 1}"
            )
    sizes = tuple(len(parts[split]) for split in ("train", "val", "test"))
    origin = {"published_sizes": sizes == (TRAIN, 200, known.test)}
    return assemble(parts, [str(label) for label in range(known.classes)], options, origin)


def _task_folder(root: Path, name: str) -> Path:
    existing(root, EXPECTED.format(root=root / name))
    if (root / "test.txt").is_file():
        return root
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and task_name(folder.name) == name:
            return folder
    return root


def _read_lists(folder: Path) -> dict[str, ImageFiles]:
    """Both lists of 800 and 200, or their join."""
    test = _read_list(folder, "test.txt")
    if (folder / "train800.txt").is_file() and (folder / "val200.txt").is_file():
        return {"train": _read_list(folder, "train800.txt"), "val": _read_list(folder, "val200.txt"), "test": test}
    if not (folder / "train800val200.txt").is_file():
        raise ValueError(f"{folder} has test.txt but no training lists; {EXPECTED.format(root=folder)}")
    both = _read_list(folder, "train800val200.txt")
    if len(both) <= TRAIN:
        raise ValueError(
            f"{folder / 'train800val200.txt'} has {len(both)} lines, which leaves none after {TRAIN} for val"
        )
    return {"train": both.subset(range(TRAIN)), "val": both.subset(range(TRAIN, len(both))), "test": test}


def _read_list(folder: Path, name: str) -> ImageFiles:
    paths, labels = [], []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.lstrip("-").isdigit():
            raise ValueError(f"line {number} of {folder / name} is {line!r}, expected a path and a number")
        paths.append(folder / path)
        labels.append(int(label))
    return ImageFiles(listed_images(paths, folder / name, EXPECTED.format(root=folder)), labels)


def _read_folders(folder: Path) -> dict[str, ImageFiles]:
    """Exported images in folders named by class number."""
    if next(folder.rglob("*.tfrecord*"), None) is not None:
        raise ValueError(
            f"{folder} holds TFRecord files, which need tensorflow. Export them once as images in "
            f"train800/<label>/, val200/<label>/ and test/<label>/; {EXPECTED.format(root=folder)}"
        )
    parts = {}
    for split, names in {"train": ("train800", "train"), "val": ("val200", "val"), "test": ("test",)}.items():
        place = next((folder / name for name in names if (folder / name).is_dir()), None)
        if place is None:
            raise ValueError(f"{folder} has neither lists nor a folder for {split}; {EXPECTED.format(root=folder)}")
        classes = sorted(each for each in place.iterdir() if each.is_dir())
        wrong = [each.name for each in classes if not each.name.isdigit()]
        if wrong or not classes:
            found = f"has the class folder {wrong[0]!r}, which is no number" if wrong else "has no class folders"
            raise ValueError(f"{place} {found}; {EXPECTED.format(root=folder)}")
        found = [(path, int(each.name)) for each in classes for path in image_files(each)]
        parts[split] = ImageFiles([path for path, _ in found], [label for _, label in found])
    return parts
