"""`deltalens predict` for segmentation, detection, instances and oriented boxes: tables, drawn pictures, masks, COCO's
JSON, DOTA's text files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from PIL import Image

    from deltalens.studies.dense_measure import Found

BATCH = 1
OF_FOLDERS = {"masks": "a file for each image", "pictures": "a file for each image", "dota": "a file for each class"}


def run_dense(args: Namespace, name: str) -> None:
    """Predict and print, write or draw. name: of the task."""
    from deltalens.cli.dense_models import reading

    with reading(args):
        _run(args, name)


def _run(args: Namespace, name: str) -> None:
    from deltalens.cli.dense_models import load_dense, refuse, tiles_of
    from deltalens.cli.oriented_files import write_dota
    from deltalens.cli.predict import find_images
    from deltalens.studies.figure import KINDS

    refuse(args, name, {"model": None, "checkpoint": None, "classes": None, "templates": None, "task": None, "topk": 1})
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is a score between 0 and 1, got {args.threshold:g}")
    is_sheet = args.output is not None and Path(args.output).suffix.lower() in KINDS
    _check_output(args, name, is_sheet)
    tiles = tiles_of(args, name)
    paths = find_images(args.images)
    task, _, device = load_dense(args, name)
    if name != "segmentation":
        task.model.keep_scores_from(args.threshold)  # type: ignore[union-attr,operator]
    with contextlib.redirect_stdout(sys.stderr):  # of what is left out: what was found may go to the terminal
        files = _files(paths, task, name, args.skip_broken)
    found = _watched(_found(args, task, files, device, tiles), name, args.threshold)
    names: list[str] = list(task.class_names)  # type: ignore[arg-type]
    if is_sheet:
        _sheet(found, names, args.output)
    elif args.format == "dota":
        count = write_dota(found, names, Path(args.output))
        print(f"what was found in {count} image{'s' if count > 1 else ''} is in {args.output}/Task1_*.txt")
    elif args.format in ("masks", "pictures"):
        _write_images(found, names, Path(args.output), args.format == "masks")
    else:
        from deltalens.lifecycle.atomic import write_text

        as_rows = partial(as_csv, oriented=name == "oriented")
        writers: dict[str, Any] = {"table": as_table, "csv": as_rows, "json": as_json, "coco": as_coco}
        text = writers[args.format](found, names)
        if args.output is None:
            print(text, end="")
        else:
            write_text(args.output, text)
            print(f"what was found in {len(files)} image{'s' if len(files) > 1 else ''} is in {args.output}")


def _check_output(args: Namespace, name: str, is_sheet: bool) -> None:
    """ValueError for a format that the task does not have, or that is written elsewhere."""
    own = {"segmentation": "masks", "oriented": "dota"}.get(name, "coco")
    of = {"masks": "segmentation", "dota": "oriented boxes", "coco": "boxes and instances"}
    if args.format in of and args.format != own:
        raise ValueError(f"--format {args.format} is for {of[args.format]}: {name} is written by --format {own}")
    if args.format in OF_FOLDERS:
        if args.output is None:
            raise ValueError(f"--format {args.format} writes {OF_FOLDERS[args.format]}: give a folder, --output DIR")
        if is_sheet or Path(args.output).is_file():
            raise ValueError(f"--format {args.format} needs a folder, and --output {args.output} is a file")
    elif is_sheet and args.format != "table":
        raise ValueError(f"{args.output} would be a drawing: write --format {args.format} to a .{args.format} file")


def _files(paths: Sequence[Path], task: Any, name: str, skip_broken: bool) -> Any:
    """The images as a dataset with empty truths, with the transform of the test."""
    import numpy as np

    import deltalens as dl
    from deltalens.data.dense_checks import look_at_all, sound
    from deltalens.data.dense_items import MaskedImages, ObjectImages, Objects
    from deltalens.data.inputs import set_inputs
    from deltalens.data.oriented_items import OrientedImages, OrientedObjects

    looked = look_at_all(paths)
    kept = sound(paths, looked, skip_broken)
    if not kept:
        raise ValueError(f"none of the {len(paths)} images can be read")
    chosen, sizes, classes = [paths[i] for i in kept], [looked[i].upright for i in kept], len(task.class_names)
    files: MaskedImages | ObjectImages | OrientedImages
    if name == "oriented":
        objects = [OrientedObjects.of([], []) for _ in chosen]
        files = OrientedImages(chosen, objects, range(1, len(chosen) + 1), sizes, classes)
    elif name == "segmentation":
        empty = [np.broadcast_to(np.uint8(255), size) for size in sizes]
        files = MaskedImages(chosen, empty, np.full(256, 255, np.uint8), np.zeros((len(chosen), classes)))
    else:
        nothing = [Objects.of([], []) for _ in chosen]
        files = ObjectImages(chosen, nothing, range(1, len(chosen) + 1), sizes, classes)
    set_inputs(files, dl.preprocessing(task.model))
    return files


def _found(args: Namespace, task: Any, files: Any, device: Any, tiles: Any) -> Iterator[Found]:
    from deltalens.studies.dense_measure import found_in

    return found_in(task, files, args.batch_size or BATCH, device, args.threshold, tiles=tiles)


def _watched(found: Iterator[Found], name: str, threshold: float) -> Iterator[Found]:
    """The same; says at the end where no object was found in any image, which is mostly too high a threshold."""
    empty = name != "segmentation" and threshold > 0
    for each in found:
        empty = empty and not each.detections
        yield each
    if empty:
        words = (
            f"nothing has a score of {threshold:g} or more: a lower --threshold shows what the detector is less sure of"
        )
        print(words, file=sys.stderr)


# ------------------------------------------------------------------ pictures
def _sheet(found: Iterator[Found], names: list[str], output: str) -> None:
    from deltalens.studies.dense_pictures import drawn, plot_sheet

    pictures: list[tuple[str, Image.Image]] = [(Path(each.name).name, drawn(each, names)) for each in found]
    plot_sheet(pictures, output)
    print(f"{len(pictures)} image{'s are' if len(pictures) > 1 else ' is'} drawn in {output}")


def _write_images(found: Iterator[Found], names: list[str], folder: Path, as_masks: bool) -> None:
    """A PNG for each image, called as it is; of two with one name the later ones get a number."""
    import numpy as np
    from PIL import Image

    from deltalens.lifecycle.atomic import atomic_path, write_text
    from deltalens.studies.dense_pictures import drawn, palette

    folder.mkdir(parents=True, exist_ok=True)
    used: dict[str, int] = {}
    for each in found:
        stem = Path(each.name).stem
        used[stem] = used.get(stem, 0) + 1
        stem = stem if used[stem] == 1 else f"{stem}-{used[stem]}"
        if as_masks:
            assert each.mask is not None
            image = Image.fromarray(each.mask.astype(np.uint8))
            image.putpalette(palette(len(names)))  # which makes it a palette image
        else:
            image = drawn(each, names)
        with atomic_path(folder / f"{stem}.png") as temporary:
            image.save(temporary, "PNG")
    if as_masks:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    count, kind = sum(used.values()), "mask" if as_masks else "drawn picture"
    print(f"{count} {kind}{'s are' if count > 1 else ' is'} in {folder}")


# ------------------------------------------------------------------ formats
def _shares(each: Found, names: list[str]) -> list[tuple[str, float]]:
    """(class, share of the pixels), largest first."""
    import numpy as np

    assert each.mask is not None
    counts = np.bincount(each.mask.reshape(-1), minlength=len(names))
    return [(names[i], counts[i] / each.mask.size) for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]


def as_table(found: Iterator[Found], names: list[str]) -> str:
    """Image by image: the classes with their shares of it, or what was found, with score and box in pixels. Oriented
    boxes as centre, sides and angle, below a line that names them."""
    from deltalens.cli.oriented_files import HEADER, table_row

    lines = []
    for each in found:
        if each.mask is not None:
            lines.append(f"{each.name}  " + "  ".join(f"{name} {share:.1%}" for name, share in _shares(each, names)))
            continue
        lines.append(f"{each.name}  {len(each.detections) or 'nothing'} found")
        oriented = [one for one in each.detections if one.oriented is not None]
        lines += [HEADER] if oriented else []
        for one in each.detections:
            upright = f"  {one.name:<16} {one.score:6.1%}  " + " ".join(f"{side:7.1f}" for side in one.box)
            lines.append(upright if one.oriented is None else table_row(one))
    return "".join(f"{line}\n" for line in lines)


def as_csv(found: Iterator[Found], names: list[str], oriented: bool = False) -> str:
    """One line per image and class (image, class, share), or per object (image, class, score, left, top, right,
    bottom), or with `oriented` (image, class, score, cx, cy, w, h, angle_degrees, x1, y1 ... x4, y4)."""
    import csv
    import io

    from deltalens.cli.oriented_files import BOX, CORNERS, csv_row

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, each in enumerate(found):
        if number == 0:
            box = (*BOX, *CORNERS) if oriented else ("left", "top", "right", "bottom")
            of_objects = ("class", "score", *box)
            writer.writerow(("image", *(of_objects if each.mask is None else ("class", "share"))))
        if each.mask is not None:
            writer.writerows((each.name, name, f"{share:.6f}") for name, share in _shares(each, names))
        for one in each.detections:
            numbers = csv_row(one) if oriented else [f"{side:.2f}" for side in one.box]
            writer.writerow((each.name, one.name, f"{one.score:.6f}", *numbers))
    return text.getvalue()


def as_json(found: Iterator[Found], names: list[str]) -> str:
    """[{"image": ..., "classes": [{"class", "share"}]}, ...], or with "objects": [{"class", "score", "box"}], of
    oriented boxes also "oriented" and "corners", and "box" is the upright one around them."""
    import json

    from deltalens.cli.oriented_files import json_entry

    entries: list[dict[str, Any]] = []
    for each in found:
        if each.mask is not None:
            said = [{"class": name, "share": float(share)} for name, share in _shares(each, names)]
            entries.append({"image": each.name, "classes": said})
        else:
            objects = [
                {"class": one.name, "score": one.score, "box": list(one.box)}
                | ({} if one.oriented is None else json_entry(one))
                for one in each.detections
            ]
            entries.append({"image": each.name, "objects": objects})
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def as_coco(found: Iterator[Found], names: list[str]) -> str:
    """COCO's JSON: "images", "categories" (ids from 1 in the order of the classes), and "annotations" with "bbox"
    (left, top, width, height), "area", "score" and of instances "segmentation" (run lengths). Its "annotations" alone
    are what COCO's tools call results."""
    import json

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, each in enumerate(found, 1):
        width, height = each.picture.size
        images.append({"id": number, "file_name": each.name, "width": width, "height": height})
        for one in each.detections:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(one, names)})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    whole = {"images": images, "categories": categories, "annotations": annotations}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _annotation(one: Any, names: list[str]) -> dict[str, Any]:
    left, top, right, bottom = one.box
    said: dict[str, Any] = {
        "category_id": names.index(one.name) + 1,
        "bbox": [left, top, right - left, bottom - top],
        "score": one.score,
        "iscrowd": 0,
    }
    if one.mask is None:
        return said | {"area": (right - left) * (bottom - top)}
    import numpy as np
    from faster_coco_eval import mask as coco_mask

    mask = np.asfortranarray(one.mask.cpu().numpy().astype(np.uint8))
    runs = coco_mask.encode(mask)
    counts = runs["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return said | {"area": float(mask.sum()), "segmentation": {"size": list(map(int, runs["size"])), "counts": text}}
