"""Classify images with a trained adapter.

Images are files, folders (every image under them) or globs ("photos/**/*.jpg"). The result is a table, CSV or JSON
with the most probable classes and their probabilities for each image; of a multi-label adapter all classes above
--threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("adapter", type=str, help="folder of the adapter")
    add("images", type=str, nargs="+", help="image files, folders or globs")
    add("--format", type=Literal["table", "csv", "json"], default="table", help="of the result")
    add("--output", type=str | None, default=None, help="file for the result, instead of the terminal")
    add("--topk", type=int, default=1, help="classes per image, most probable first")
    add("--threshold", type=float, default=0.5, help="least probability of a class, for multi-label adapters")
    add("--skip-broken", type=bool, default=False, help="leave out images that cannot be read")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")


def run(args: Namespace) -> None:
    """Classify and print or write."""
    if args.topk < 1:
        raise ValueError(f"topk must be at least 1, got {args.topk}")
    paths = find_images(args.images)
    rows = _predict(args, paths)
    text = {"table": as_table, "csv": as_csv, "json": as_json}[args.format](rows)
    if args.output is None:
        print(text, end="")
        return
    from deltalens.lifecycle.atomic import write_text

    write_text(args.output, text)
    print(f"{len(rows)} predictions are in {args.output}")


def find_images(words: list[str]) -> list[Path]:
    """Files in the order given, folders and globs sorted inside, each once. FileNotFoundError names what matches
    nothing."""
    from glob import glob
    from pathlib import Path

    from deltalens.data.image_folder import EXTENSIONS, image_files

    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            matches = image_files(path)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob(word, recursive=True) if Path(p).suffix.lower() in EXTENSIONS)
        if not matches:
            raise FileNotFoundError(f"no images at {word}: expected an image file, a folder of images or a glob")
        found.update(dict.fromkeys(matches))
    return list(found)


def _predict(args: Namespace, paths: list[Path]) -> list[tuple[str, list[tuple[str, float]]]]:
    import torch

    import deltalens as dl
    from deltalens.cli.trained import load_trained
    from deltalens.data.image_folder import ImageFiles, without_broken
    from deltalens.data.transforms import eval_transform, image_mode
    from deltalens.tasks import MultiLabelTask, task_class
    from deltalens.training.loaders import evaluation_loader

    model, class_names, device = load_trained(args.adapter, args.device)
    preprocessing = dl.preprocessing(model)
    files = ImageFiles(paths, [0] * len(paths), eval_transform(preprocessing), image_mode(preprocessing))
    if args.skip_broken:
        files = without_broken(files, True)
    task = task_class(dl.adapter_info(model).get("task"))(model, class_names)
    how = {"threshold": args.threshold} if isinstance(task, MultiLabelTask) else {"topk": args.topk}
    decoded = []
    with torch.inference_mode():
        for images, _ in evaluation_loader(files, args.batch_size):
            decoded += task.decode(model(images.to(device)), **how)
    return [(str(path), classes) for path, classes in zip(files.paths, decoded, strict=True)]


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
