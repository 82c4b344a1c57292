"""Dense tasks and the formats that serve them: which one a folder is, for a task that may be asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

DENSE_TASKS = ("segmentation", "detection", "instance", "oriented")
DENSE_FORMATS = {
    "dota": "deltalens.data.dota_txt",
    "rolabelimg": "deltalens.data.rolabelimg",
    "coco": "deltalens.data.coco_json",
    "voc": "deltalens.data.voc_boxes",
    "voc-masks": "deltalens.data.voc_masks",
    "yolo": "deltalens.data.yolo_txt",
    "ade20k": "deltalens.data.ade20k",
    "cityscapes": "deltalens.data.cityscapes",
    "masks": "deltalens.data.mask_folders",
}  # "masks" is asked last: ADE20K is one, too
SERVES = {
    "segmentation": ("masks", "voc-masks", "ade20k", "cityscapes"),
    "detection": ("voc", "coco", "yolo"),
    "instance": ("coco", "yolo"),
    "oriented": ("dota", "rolabelimg"),
}


def dense_module(format: str) -> ModuleType:
    return importlib.import_module(DENSE_FORMATS[format])


def candidates(root: Path) -> dict[str, tuple[str, ...]]:
    """format -> tasks, for the dense formats that a folder is laid out in. Of several for segmentation the first."""
    if not root.is_dir():
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for name in DENSE_FORMATS:
        new = dense_module(name).tasks(root)
        if new and not (new == ("segmentation",) and new in found.values()):
            found[name] = new
    return found


def dense_format(root: Path, task: str | None) -> str | None:
    """The dense format of a folder, for a task or for the only one that it serves.

    None where it is laid out in none of them and no task is asked for. Raises FileNotFoundError for a missing folder,
    ValueError with the expected trees where a task is asked for that it does not serve, and ValueError that names the
    tasks where it serves several and none is asked for.
    """
    found = candidates(root)
    if task is None:
        _refuse_several(root, {each for tasks in found.values() for each in tasks})
        return next(iter(found), None)
    fitting = [name for name, tasks in found.items() if task in tasks]
    if fitting:
        return fitting[0]
    trees = "\nor ".join(dense_module(name).EXPECTED.format(root=root) for name in SERVES[task])
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}; {trees}")
    serves = f"; it is laid out for {_words(found)}" if found else ""
    raise ValueError(f"{root} is not laid out for {task}{serves}; {trees}")


def dense_task(format: str, root: Path, task: str | None) -> str:
    """The task that a folder is read for in a dense format. ValueError where it serves another, or several."""
    serves = tuple(each for each in DENSE_TASKS if format in SERVES[each])
    if task is not None and task not in serves:
        raise ValueError(f"the format {format} is for {' and '.join(serves)}, not for {task}")
    if len(serves) == 1:
        return serves[0]
    here = dense_module(format).tasks(root) if root.is_dir() else ()
    if task is None:
        _refuse_several(root, set(here))
        return here[0] if here else serves[0]
    if here and task not in here:
        raise ValueError(f"{root} has no masks of objects, only boxes: it serves {' and '.join(here)}, not {task}")
    return task


def _refuse_several(root: Path, tasks: set[str]) -> None:
    if len(tasks) > 1:
        names = [task for task in DENSE_TASKS if task in tasks]
        raise ValueError(f"{root} serves {', '.join(names)}: say which task (--task {names[0]})")


def _words(found: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{' and '.join(tasks)} ({name})" for name, tasks in found.items())
