"""Measure a trained adapter, or a zero-shot model, on a folder of images or point clouds, or of pictures with masks or
boxes.

The folder has train, val or test folders as in training, or only class folders: then --split test means the part that
the training run kept for test, and --split all every image. Other layouts are read as in training.

Classes that are texts may be those of the data (--class-names data), which other data needs. A model with an image and
a text tower is measured zero-shot with --model in place of the adapter.

Of clouds --votes averages the logits of several random views of each, once. Of segmentation, detection, instances
and oriented boxes every class has its row, and --report writes a page with confusion and example pictures; --tile looks
at large pictures with oriented boxes tile by tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli.dense_models import NOT_CLASSES, add_inference_arguments, dense_task_of_adapter, refuse
from deltalens.cli.trained import Classifier, add_model_arguments, load_classifier, room_for_model

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from deltalens.tasks import ClassificationTask

translate = room_for_model


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--data", type=str, required=True, help="folder of images or point clouds")
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
    add("--split", type=Literal["train", "val", "test", "all"], default="test", help="which part of the data")
    add(
        "--classes",
        type=Literal["all", "base", "new"] | None,
        default=None,
        help="images of all classes, or of the first or the second half; by default the training run's",
    )
    add("--skip-broken", type=bool, default=False, help="leave out images or clouds that cannot be read")
    add(
        "--votes",
        type=int,
        default=0,
        help="of clouds: average the logits of so many random subsets, scaled and shifted; 0 for the plain test",
    )
    add("--seed", type=int, default=0, help="of the votes' random views")
    add_inference_arguments(parser)
    add("--threshold", type=float, default=0.3, help="of objects: least score in the confusion and the report")
    add("--report", type=str | None, default=None, metavar="FILE", help="of dense tasks: an HTML page for the results")
    add(
        "--batch-size",
        type=int | None,
        default=None,
        help="images or clouds at a time, by default 64, with masks or boxes 4",
    )
    add("--workers", type=int | None, default=None, help="loader processes; by default by the number of cores")
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")
    add("--output", type=str | None, default=None, help="JSON file for the results")


def run(args: Namespace) -> None:
    """Evaluate, print and optionally write the metrics."""
    dense = dense_task_of_adapter(args.adapter)
    if dense is not None:
        from deltalens.cli.dense_evaluate import run_dense

        run_dense(args, dense)
        return
    refuse(args, "classification", {**NOT_CLASSES, "report": None})
    args.batch_size = args.batch_size or 64
    _run_classes(args)


def _run_classes(args: Namespace) -> None:
    import json

    import torch

    import deltalens as dl
    from deltalens.data.inputs import IMAGES, check_same_kind
    from deltalens.lifecycle.atomic import write_text

    classifier, files, task = _classifier_and_images(args)
    preprocessing, device = dl.preprocessing(classifier.model), classifier.device
    kind = check_same_kind(files, preprocessing)
    if args.votes and kind == IMAGES:
        raise ValueError("--votes is for point clouds: an image has but one view here")
    metrics = task.new_metrics().to(device)
    loss = 0.0
    with torch.inference_mode():
        for result, batch in _answers(args, task, files, preprocessing, device):
            task.update_metrics(metrics, result, batch)
            loss += float(result["loss"]) * len(batch[1]) / len(files)
    values = {"loss": loss, **{name: float(value) for name, value in metrics.compute().items()}}
    for name, value in values.items():
        print(f"{name:<20} {value:.4f}")
    counted = "images" if kind == IMAGES else "clouds"
    print(f"{counted:<20} {len(files)} ({args.split}{f', {args.votes} votes' if args.votes else ''})")
    per_class = task.per_class(metrics)
    for name, value in per_class.items():
        print(f"  {name:<18} {value:.4f}")
    if args.output:
        measured = {"model": args.model} if args.model else {"adapter": args.adapter}
        results: dict[str, Any] = {**measured, "data": args.data, "split": args.split, counted: len(files), **values}
        if args.votes:
            results["votes"] = {"views": args.votes, "seed": args.seed}
        if per_class:
            results["per_class"] = {name: None if value != value else value for name, value in per_class.items()}
        write_text(args.output, json.dumps(results, indent=2) + "\n")


def _answers(args: Namespace, task: ClassificationTask, files: Any, preprocessing: dict[str, Any], device: Any):
    """(what the task says, batch) of all data, in order; the mean over the votes, where there are some."""
    from deltalens.data.inputs import Augmentation, set_inputs
    from deltalens.training.loaders import default_workers, evaluation_loader
    from deltalens.training.voting import voted

    if args.votes < 0:
        raise ValueError(f"--votes must be 0 or more, got {args.votes}")
    workers = default_workers() if args.workers is None else args.workers
    set_inputs(files, preprocessing, Augmentation() if args.votes else None)
    if args.votes:
        yield from voted(task, files, args.votes, args.batch_size, args.seed, workers, device)
        return
    for images, labels in evaluation_loader(files, args.batch_size, workers):
        batch = (images.to(device), labels.to(device))
        yield task(batch), batch


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
