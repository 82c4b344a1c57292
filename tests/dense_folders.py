"""Small datasets of dense tasks in every layout: pictures, masks, boxes, and what they must be read as."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 16, 12
SIZES = {"train": 4, "val": 2, "test": 2}


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype("uint8")
    Image.fromarray(pixels).convert(mode).save(file)
    return file


def mask(file: Path, values: np.ndarray | list | None = None, palette: bool = False, seed: int = 0) -> Path:
    """A mask of the values 0, 1 and 2, or of those given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(seed).integers(0, 3, (HEIGHT, WIDTH))
        values[0, :3] = 0, 1, 2
    image = Image.fromarray(np.asarray(values).astype("uint8"))
    if palette:
        image.putpalette([level for i in range(256) for level in (i, 255 - i, (7 * i) % 256)])
    image.save(file)
    return file


# ------------------------------------------------------------------ masks
def masked_pairs(root: Path, sizes=SIZES, kind: str = "masks", parts: dict[str, str] | None = None, **settings) -> Path:
    for part, count in sizes.items():
        name = (parts or {}).get(part, part)
        for i in range(count):
            picture(root / "images" / name / f"{part}{i}.jpg", i)
            mask(root / kind / name / f"{part}{i}.png", seed=i, **settings)
    return root


# ------------------------------------------------------------------ VOC
def xml_of(objects, width: int = WIDTH, height: int = HEIGHT) -> str:
    """objects: (name, box) or (name, box, difficult)."""
    lines = [f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for name, (left, top, right, bottom), *difficult in objects:
        flag = int(bool(difficult and difficult[0]))
        lines += [
            f"<object><name>{name}</name><truncated>1</truncated><difficult>{flag}</difficult>",
            f"<bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>",
        ]
    return "\n".join([*lines, "</annotation>"])


def voc(root: Path, lists: dict[str, list[str]], objects=None, folder: str = "ImageSets/Main", first: int = 0) -> Path:
    """objects: of each name; two boxes of a cat and a dog where nothing is given."""
    names = sorted({name for each in lists.values() for name in each})
    for part, listed in lists.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{part}.txt").write_text("\n".join(listed) + "\n")
    for number, name in enumerate(names):
        picture(root / "JPEGImages" / f"{name}.jpg", first + number)
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        there = (objects or {}).get(name, [("dog", (1, 2, 7, 9)), ("cat", (4, 4, 14, 11), True)])
        (root / "Annotations" / f"{name}.xml").write_text(xml_of(there))
    return root


VOC_LISTS = {"train": ["a0", "a1", "a2", "a3"], "val": ["b0", "b1"], "test": ["c0", "c1"]}


# ------------------------------------------------------------------ COCO
def rle(values: np.ndarray) -> dict:
    """COCO's uncompressed run-length code: down the columns, zeros first."""
    flat = np.asarray(values).T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return {"size": list(np.shape(values)), "counts": ([0, *runs] if flat[0] else runs)}


def block(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    values = np.zeros((HEIGHT, WIDTH), "uint8")
    values[top:bottom, left:right] = 1
    return values


CATEGORIES = [{"id": 3, "name": "ship"}, {"id": 90, "name": "tree"}]


def coco_content(names: list[str], with_masks: bool = True, first: int = 1) -> dict:
    """Of each picture a polygon and a run-length code; of the last one nothing."""
    images = [{"id": first + i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names)]
    annotations = []
    for image in images[:-1]:
        polygon = [[2, 1, 8, 1, 8, 6, 2, 6]]
        for bbox, category, outline in (
            ([2, 1, 6, 5], 90, polygon),
            ([5, 3, 9, 7], 3, rle(block(5, 3, 14, 10))),
        ):
            each = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "bbox": bbox}
            each |= {"area": 30.0, "iscrowd": int(category == 3)}
            annotations.append(each | ({"segmentation": outline} if with_masks else {}))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES[::-1]}


def coco(root: Path, sizes=SIZES, year: str = "", folder: str = "images", with_masks: bool = True) -> Path:
    """folder: "images", or "split" for a folder of pictures for each part."""
    for part, count in sizes.items():
        names = [f"{part}{i}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            picture(root / (f"{part}{year}" if folder == "split" else folder) / name, i)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        file = root / "annotations" / f"instances_{part}{year}.json"
        file.write_text(json.dumps(coco_content(names, with_masks)))
    return root


def change(file: Path, how) -> None:
    """Read JSON, change it in place, and write it again."""
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


# ------------------------------------------------------------------ YOLO
def yolo(
    root: Path, sizes=SIZES, lines: str = "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.5\n", inside: bool = False
) -> Path:
    """The last picture of every part has no file of labels. inside: train/images instead of images/train."""
    for part, count in sizes.items():
        folders = [root / part / kind if inside else root / kind / part for kind in ("images", "labels")]
        for i in range(count):
            picture(folders[0] / f"{part}{i}.jpg", i)
            folders[1].mkdir(parents=True, exist_ok=True)
            if i < count - 1:
                (folders[1] / f"{part}{i}.txt").write_text(lines)
    (root / "data.yaml").write_text("names:\n  0: hat\n  1: shoe\n")
    return root
