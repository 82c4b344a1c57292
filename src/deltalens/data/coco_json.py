"""The format "coco": boxes and masks of objects in COCO's JSON files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltalens.data.assemble import existing
from deltalens.data.class_lists import read_json
from deltalens.data.dense_checks import Size, several
from deltalens.data.dense_items import Objects
from deltalens.data.image_folder import SPLIT_FOLDERS
from deltalens.data.object_parts import Annotated, object_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

NAME = "coco"
EXPECTED = """expected in {root} objects as COCO has them:
    annotations/instances_train.json, instances_val.json, instances_test.json    (or instances_train2017.json)
    images/*.jpg       (or images/train/*.jpg, train/*.jpg, train2017/*.jpg: where file_name leads from there)
or as Roboflow exports them:
    train/_annotations.coco.json, valid/..., test/...    (beside the pictures of each part)"""
ROBOFLOW = "_annotations.coco.json"
PARTS = "|".join(name for names in SPLIT_FOLDERS.values() for name in names)
FILE = re.compile(rf"instances_({PARTS})(\d{{4}})?\.json")
OUTLINE = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[\s*[-\d]|\{\s*"(counts|size)")')
CHUNK, OVERLAP = 1 << 22, 64


def tasks(root: Path) -> tuple[str, ...]:
    """("detection",), ("detection", "instance") where the files of `root` hold outlines, () where there are none."""
    files = _files(root)
    if not files:
        return ()
    return ("detection", "instance") if _has_outlines(next(iter(files.values()))) else ("detection",)


def recognise(root: Path) -> str | None:
    return NAME if _files(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "coco" of `deltalens.data.read_data`, tasks "detection" and "instance".

    Class names are the categories of the training file by their ids, which `origin["category_ids"]` keeps. Crowd
    regions are kept and marked. val2017 without a test file is the test part, as papers use it, and val is split off
    train. Raises FileNotFoundError or ValueError with the expected tree for missing files and pictures, ValueError for
    ids twice, annotations for pictures or of categories that are not there, and outlines for a picture of another size.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    files = _files(existing(root, expected))
    if "train" not in files:
        raise ValueError(f"{root} has no annotations/instances_train.json and no train/{ROBOFLOW}; {expected}")
    official = "test" not in files and "val" in files and _year(files["val"])
    if official:
        files["test"] = files.pop("val")
    contents = {part: _content(file) for part, file in files.items()}
    for part, file in files.items():
        if file.name == ROBOFLOW:
            contents[part]["categories"] = _without_group(contents[part])
    categories = sorted(contents["train"]["categories"], key=lambda each: each["id"])
    names = [str(each["name"]) for each in categories]
    _once(names, f"{files['train']} has the category")
    masks = options.task == "instance"
    parts = {part: _pictures(root, files[part], contents[part], names, masks, expected) for part in files}
    origin: dict[str, Any] = {"category_ids": [int(each["id"]) for each in categories]}
    if official:
        origin["test"] = files["test"].name
    return object_splits(parts, names, options, masks, origin)


def _files(root: Path) -> dict[str, Path]:
    """part -> annotation file. Nothing without train."""
    found: dict[str, Path] = {}
    for file in sorted((root / "annotations").glob("instances_*.json")):
        match = FILE.fullmatch(file.name)
        if match:
            part = next(part for part, names in SPLIT_FOLDERS.items() if match[1] in names)
            found.setdefault(part, file)
    if not found:
        beside = [(part, root / name / ROBOFLOW) for part, names in SPLIT_FOLDERS.items() for name in names]
        found = {part: file for part, file in reversed(beside) if file.is_file()}
    return {part: found[part] for part in ("train", "val", "test") if part in found} if "train" in found else {}


def _year(file: Path) -> str | None:
    """ "2017" of instances_val2017.json."""
    match = FILE.fullmatch(file.name)
    return match[2] if match else None


def _without_group(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories but the one that Roboflow lists before them as their "supercategory", which has no objects."""
    used = {each["category_id"] for each in content["annotations"]}
    groups = {each.get("supercategory") for each in content["categories"]}
    return [
        each
        for each in content["categories"]
        if each["id"] in used or each["name"] not in groups or each.get("supercategory") not in (None, "none")
    ]


def _has_outlines(file: Path) -> bool:
    """Whether a file holds a segmentation; read in pieces up to the first one."""
    tail = b""
    with open(file, "rb") as stream:
        while piece := stream.read(CHUNK):
            if OUTLINE.search(tail + piece):
                return True
            tail = piece[-OVERLAP:]
    return False


def _content(file: Path) -> dict[str, Any]:
    content = read_json(file)
    lacking = [
        key for key in ("images", "annotations", "categories") if not isinstance(content, dict) or key not in content
    ]
    if lacking:
        raise ValueError(f"{file} has no list of {lacking[0]}: it is no file of COCO's objects")
    for kind, needed in (("images", ("id", "file_name")), ("annotations", ("image_id", "category_id", "bbox"))):
        for number, each in enumerate(content[kind]):
            absent = [key for key in needed if key not in each]
            if absent:
                raise ValueError(f"{file}: number {number} of {kind} has no {absent[0]}")
    return dict(content)


def _pictures(
    root: Path, file: Path, content: dict[str, Any], names: list[str], masks: bool, expected: str
) -> list[Annotated[Objects]]:
    images = content["images"]
    ids = [image["id"] for image in images]
    _once(ids, f"{file} has the image id")
    label_of = _labels(file, content["categories"], names)
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for each in content["annotations"]:
        of_image[each["image_id"]].append(each)
        if each["category_id"] not in label_of:
            raise ValueError(
                f"annotation {each.get('id', '')} of {file} has the unknown category {each['category_id']}"
            )
    known = set(ids)
    strangers = [image for image in of_image if image not in known]
    if strangers:
        raise ValueError(f"{file} has annotations for {len(strangers)} images that it does not list: id {strangers[0]}")
    paths = _paths(root, file, [str(image["file_name"]) for image in images], expected)
    numbers = ids if all(isinstance(id, int) for id in ids) else range(1, len(ids) + 1)
    pictures = []
    for path, image, number in zip(paths, images, numbers, strict=True):
        where = f"image {image['id']} of {file}"
        objects = partial(_objects, of_image[image["id"]], label_of, masks, where)
        pictures.append(Annotated(path, objects, where, number, _stated(image)))
    return pictures


def _labels(file: Path, categories: Sequence[dict[str, Any]], names: list[str]) -> dict[int, int]:
    """category id -> label. ValueError for categories that the training file does not have."""
    _once([each["id"] for each in categories], f"{file} has the category id")
    unknown = [str(each["name"]) for each in categories if str(each["name"]) not in names]
    if unknown:
        raise ValueError(f"{file} has the class {unknown[0]!r}, which the training file does not have")
    return {each["id"]: names.index(str(each["name"])) for each in categories}


def _paths(root: Path, file: Path, names: Sequence[str], expected: str) -> list[Path]:
    """The pictures, from the first folder in which the first of them lies."""
    match = FILE.fullmatch(file.name)
    folders = [file.parent]  # of Roboflow's
    if match is not None:
        part, split = match[1], f"{match[1]}{match[2] or ''}"
        pictures = root / "images"
        folders = [pictures, root, pictures / split, root / split, pictures / part, root / part]
    start = next((folder for folder in folders if names and (folder / names[0]).is_file()), folders[0])
    paths = [start / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} images of {file} are missing: {several(missing)}; {expected}")
    return paths


def _stated(image: dict[str, Any]) -> Size | None:
    return (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None


def _objects(found: Sequence[dict[str, Any]], label_of: dict[int, int], masks: bool, where: str, size: Size) -> Objects:
    boxes = []
    for each in found:
        if len(each["bbox"]) != 4:
            raise ValueError(f"annotation {each.get('id', '')} of {where} has a bbox of {len(each['bbox'])} numbers")
        left, top, width, height = map(float, each["bbox"])
        boxes.append((left, top, left + width, top + height))
    return Objects.of(
        boxes,
        [label_of[each["category_id"]] for each in found],
        [each.get("area", (box[2] - box[0]) * (box[3] - box[1])) for each, box in zip(found, boxes, strict=True)],
        [each.get("iscrowd", 0) for each in found],
        outlines=[each.get("segmentation") or None for each in found] if masks else (),
    )


def _once(values: Sequence[Any], words: str) -> None:
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise ValueError(f"{words} {twice[0]!r} twice")
