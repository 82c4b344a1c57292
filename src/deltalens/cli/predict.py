"""Classify images or clouds with a trained adapter, or zero-shot with a model that has an image and a text tower; find
objects in images, or the class of every pixel, with an adapter that was trained for it.

An adapter whose classes are texts takes other ones by --classes; a zero-shot model (--model) has no others.
Images, or of an adapter for points clouds (.npy, .npz, .ply, .off, .xyz, .txt, .pts), are files, folders (every one
under them) or globs ("photos/**/*.jpg"). The result is a table, CSV or JSON, of clouds also a figure (--output x.svg),
with the most probable classes and their probabilities for each image; of a multi-label adapter all classes above
--threshold.

Objects and masks: --output x.png, .svg or .pdf draws all images on a sheet, --format pictures --output DIR each in a
file; --format coco writes COCO's JSON of boxes and instances above --threshold, --format dota the text files of DOTA's
server, one for each class, --format masks PNGs of class numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli.dense_models import NOT_CLASSES, add_inference_arguments, dense_task_of_adapter, refuse
from deltalens.cli.trained import Classifier, add_model_arguments, load_classifier, room_for_model

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import ArgumentParser, Namespace

    from deltalens.tasks import ClassificationTask

translate = room_for_model


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("images", type=str, nargs="+", help="image or cloud files, folders or globs")
    add(
        "--classes",
        type=list[str] | str | None,
        default=None,
        help="classes that are texts: 'cat, dog', a list, or a .txt file with one on a line",
    )
    add(
        "--templates",
        type=list[str] | str | None,
        default=None,
        help="what is said of a class, 'a photo of a {}.', a list of such, or a .txt file with one on a line",
    )
    add(
        "--task",
        type=Literal["classification", "multilabel"] | None,
        default=None,
        help="multilabel asks for each class by itself; for SigLIP. By default what the adapter was trained for",
    )
    add(
        "--format",
        type=Literal["table", "csv", "json", "coco", "dota", "masks", "pictures"],
        default="table",
        help="of the result, or by the ending of --output, .csv or .json; coco, dota, masks and pictures are of "
        "objects and masks",
    )
    add(
        "--output",
        type=str | None,
        default=None,
        help="file for the result, instead of the terminal; .svg, .png and .pdf draw clouds, objects and masks",
    )
    add("--topk", type=int, default=1, help="classes per image, most probable first")
    add("--threshold", type=float, default=0.5, help="least probability of a class, of several labels; least score")
    add_inference_arguments(parser)
    add("--skip-broken", type=bool, default=False, help="leave out images or clouds that cannot be read")
    add(
        "--batch-size",
        type=int | None,
        default=None,
        help="images or clouds at a time, by default 64, with masks or boxes 1",
    )
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")


def run(args: Namespace) -> None:
    """Predict and print, write or draw."""
    from pathlib import Path

    from deltalens.studies.figure import KINDS

    ending = "" if args.output is None else Path(args.output).suffix.lower()[1:]
    if args.format == "table" and ending in ("csv", "json"):
        args.format = ending
    dense = dense_task_of_adapter(args.adapter)
    if dense is not None:
        from deltalens.cli.dense_predict import run_dense

        run_dense(args, dense)
        return
    refuse(args, "classification", NOT_CLASSES)
    if args.format in ("coco", "dota", "masks", "pictures"):
        raise ValueError(f"--format {args.format} is of objects and masks: a classifier has table, csv and json")
    args.batch_size = args.batch_size or 64
    if args.topk < 1:
        raise ValueError(f"topk must be at least 1, got {args.topk}")
    rows, files = _predict(args)
    if args.output is not None and Path(args.output).suffix.lower() in KINDS:
        _draw(args.output, rows, files)
        return
    text = {"table": as_table, "csv": as_csv, "json": as_json}[args.format](rows)
    if args.output is None:
        print(text, end="")
        return
    from deltalens.lifecycle.atomic import write_text

    write_text(args.output, text)
    print(f"{len(rows)} predictions are in {args.output}")


def _draw(output: str, rows: list[tuple[str, list[tuple[str, float]]]], files: Any) -> None:
    """The clouds with what is said of them, as a figure."""
    from deltalens.data.clouds import Clouds
    from deltalens.studies.cloud_plots import plot_predictions

    if not isinstance(files, Clouds):
        raise ValueError(f"figures are drawn of point clouds, and these are images: write {output} as .csv or .json")
    plot_predictions([files.cloud(index) for index in range(len(rows))], rows, output)
    print(f"{len(rows)} clouds are drawn in {output}")


def find_images(words: list[str], clouds: bool = False) -> list[Path]:
    """Files in the order given, folders and globs sorted inside, each once; of clouds or of images. FileNotFoundError
    names what matches nothing."""
    from glob import glob
    from pathlib import Path

    from deltalens.data import cloud_files, image_folder

    known, inside = (image_folder.EXTENSIONS, image_folder.image_files)
    if clouds:
        known, inside = (cloud_files.EXTENSIONS, cloud_files.cloud_files)
    what = "cloud" if clouds else "image"
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            matches = inside(path)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob(word, recursive=True) if Path(p).suffix.lower() in known)
        if not matches:
            raise FileNotFoundError(
                f"no {what}s at {word}: expected {'a' if clouds else 'an'} {what} file, a folder of {what}s or a glob"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _predict(args: Namespace) -> tuple[list[tuple[str, list[tuple[str, float]]]], Any]:
    """(file and its classes of each, the files)."""
    import contextlib
    import sys

    import torch

    import deltalens as dl
    from deltalens.cli.word_lists import read_words
    from deltalens.data.clouds import CloudFiles, without_broken_clouds
    from deltalens.data.image_folder import ImageFiles, without_broken
    from deltalens.data.inputs import POINTS, kind_of, set_inputs
    from deltalens.tasks import MultiLabelTask
    from deltalens.training.loaders import evaluation_loader

    class_names = read_words(args.classes, "classes", commas=True)
    classifier = load_classifier(args, class_names, read_words(args.templates, "templates"))
    model, task = classifier.model, _task(args, classifier)
    preprocessing = dl.preprocessing(model)
    clouds = kind_of(preprocessing) == POINTS
    paths = find_images(args.images, clouds)
    files: Any = (CloudFiles if clouds else ImageFiles)(paths, [0] * len(paths))
    if args.skip_broken:
        with contextlib.redirect_stdout(sys.stderr):  # of what is left out: the table may go to the terminal
            files = (without_broken_clouds if clouds else without_broken)(files, True)
    set_inputs(files, preprocessing)
    how = {"threshold": args.threshold} if isinstance(task, MultiLabelTask) else {"topk": args.topk}
    decoded = []
    with torch.inference_mode():
        for images, _ in evaluation_loader(files, args.batch_size):
            decoded += task.decode(model(images.to(classifier.device)), **how)
    return [(str(path), classes) for path, classes in zip(files.paths, decoded, strict=True)], files


def _task(args: Namespace, classifier: Classifier) -> ClassificationTask:
    """What is asked of an image: the adapter's task, or the one that --task names."""
    from deltalens.cli.trained import trained_with_sigmoid
    from deltalens.tasks import MultiLabelTask, task_class

    own = classifier.info.get("task")
    task = task_class(own if args.task is None else args.task)
    if task is MultiLabelTask and task is not task_class(own) and not trained_with_sigmoid(classifier.model):
        raise ValueError(
            f"{classifier.said} tells classes from each other and does not say whether one is there by itself: "
            "--task multilabel is for SigLIP, and for adapters that were trained with several labels"
        )
    if task is not MultiLabelTask and args.classes is not None and len(classifier.class_names) < 2:
        raise ValueError(
            f"{classifier.class_names[0]!r} alone is always certain: name a second class to tell it from, or rank the "
            "images with deltalens search"
        )
    return task(classifier.model, classifier.class_names)


# ------------------------------------------------------------------ formats
def as_table(rows: list[tuple[str, list[tuple[str, float]]]]) -> str:
    """Aligned columns: image, then class and probability in per cent."""
    width = max((len(image) for image, _ in rows), default=0)
    names = max((len(name) for _, classes in rows for name, _ in classes), default=0)
    lines = (f"{image:<{width}}  " + "  ".join(f"{n:<{names}} {p:6.1%}" for n, p in classes) for image, classes in rows)
    return "".join(line.rstrip() + "\n" for line in lines)


def as_csv(rows: list[tuple[str, list[tuple[str, float]]]]) -> str:
    """One line per image and class: image, rank, class, probability."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "probability"))
    for image, classes in rows:
        writer.writerows((image, rank, name, f"{p:.6f}") for rank, (name, p) in enumerate(classes, 1))
    return text.getvalue()


def as_json(rows: list[tuple[str, list[tuple[str, float]]]]) -> str:
    """[{"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}, ...]."""
    import json

    entries: list[dict[str, Any]] = [
        {"image": image, "predictions": [{"class": name, "probability": p} for name, p in classes]}
        for image, classes in rows
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
