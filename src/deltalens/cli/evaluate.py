"""Measure a trained adapter, or a zero-shot model, on a folder of images.

The folder has train, val or test folders as in training, or only class folders: then --split test means the part that
the training run kept for test, and --split all every image. Other layouts are read as in training.

Classes that are texts may be those of the data (--class-names data), which other data needs. A model with an image and
a text tower is measured zero-shot with --model in place of the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli.trained import Classifier, add_model_arguments, load_classifier, room_for_model

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from deltalens.tasks import ClassificationTask

translate = room_for_model


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--data", type=str, required=True, help="folder of images")
    add(
        "--class-names",
        type=Literal["adapter", "data"] | None,
        default=None,
        help="whose classes: the adapter's, or as texts the data's; by default the adapter's, with --model the data's",
    )
    add(
        "--templates",
        type=list[str] | str | None,
        default=None,
        help="what is said of a class, 'a photo of a {}.', a list of such, or a .txt file with one on a line",
    )
    add("--format", type=str | None, default=None, help="of the data, as in train; by default the training run's")
    add("--download", type=bool, default=False, help="fetch the data where its format knows how")
    add("--split", type=Literal["train", "val", "test", "all"], default="test", help="which images")
    add(
        "--classes",
        type=Literal["all", "base", "new"] | None,
        default=None,
        help="images of all classes, or of the first or the second half; by default the training run's",
    )
    add("--skip-broken", type=bool, default=False, help="leave out images that cannot be read")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--workers", type=int | None, default=None, help="loader processes; by default by the number of cores")
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")
    add("--output", type=str | None, default=None, help="JSON file for the results")


def run(args: Namespace) -> None:
    """Evaluate, print and optionally write the metrics."""
    import json

    import torch

    import deltalens as dl
    from deltalens.data import eval_transform
    from deltalens.data.transforms import image_mode
    from deltalens.lifecycle.atomic import write_text
    from deltalens.training.loaders import default_workers, evaluation_loader

    classifier, files, task = _classifier_and_images(args)
    preprocessing, device = dl.preprocessing(classifier.model), classifier.device
    files.transform, files.mode = eval_transform(preprocessing), image_mode(preprocessing)
    metrics = task.new_metrics().to(device)
    workers = default_workers() if args.workers is None else args.workers
    loss = 0.0
    with torch.inference_mode():
        for images, labels in evaluation_loader(files, args.batch_size, workers):
            batch = (images.to(device), labels.to(device))
            result = task(batch)
            task.update_metrics(metrics, result, batch)
            loss += float(result["loss"]) * len(labels) / len(files)
    values = {"loss": loss, **{name: float(value) for name, value in metrics.compute().items()}}
    for name, value in values.items():
        print(f"{name:<20} {value:.4f}")
    print(f"{'images':<20} {len(files)} ({args.split})")
    per_class = task.per_class(metrics)
    for name, value in per_class.items():
        print(f"  {name:<18} {value:.4f}")
    if args.output:
        measured = {"model": args.model} if args.model else {"adapter": args.adapter}
        results: dict[str, Any] = {**measured, "data": args.data, "split": args.split, "images": len(files), **values}
        if per_class:
            results["per_class"] = {name: None if value != value else value for name, value in per_class.items()}
        write_text(args.output, json.dumps(results, indent=2) + "\n")


def _classifier_and_images(args: Namespace) -> tuple[Classifier, Any, ClassificationTask]:
    """(classifier, images without a transform, task) for the classes that are asked for."""
    from deltalens.cli.word_lists import read_words
    from deltalens.data import read_part
    from deltalens.data.image_folder import UnknownClasses
    from deltalens.data.named_parts import read_named_part
    from deltalens.tasks import task_class

    templates = read_words(args.templates, "templates")
    reading = {"skip_broken": args.skip_broken, "download": args.download, "subset": args.classes}
    if args.class_names == "data" or (args.model is not None and args.class_names is None):
        files, names, task = read_named_part(args.data, args.split, args.format, **reading)
        classifier = load_classifier(args, names, templates)
        trained = classifier.info.get("task") or task
        if trained != task:
            raise ValueError(f"{classifier.said} was trained for {trained}, and {args.data} is data for {task}")
        return classifier, files, task_class(task)(classifier.model, names).eval()
    if args.model is not None:
        raise ValueError(
            f"{args.model} without an adapter has no classes of its own: --class-names data takes the data's"
        )
    classifier = load_classifier(args, None, templates)
    names, info = classifier.class_names, classifier.info
    try:
        files = read_part(args.data, args.split, names, info.get("split"), args.format, **reading)
    except UnknownClasses as error:
        raise UnknownClasses(f"{error}{_hint(classifier)}") from error
    return classifier, files, task_class(info.get("task"))(classifier.model, names).eval()


def _hint(classifier: Classifier) -> str:
    import deltalens as dl

    texts = isinstance(classifier.model, dl.ZeroShotClassifier)
    return ". Its classes are texts: --class-names data takes those of the data" if texts else ""
