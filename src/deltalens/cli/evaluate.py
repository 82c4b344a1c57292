"""Measure a trained adapter on a folder of images.

The folder has train, val or test folders as in training, or only class folders: then --split test means the part that
the training run kept for test, and --split all every image. Other layouts are read as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("adapter", type=str, help="folder of the adapter")
    add("--data", type=str, required=True, help="folder of images")
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
    from deltalens.cli.trained import load_trained
    from deltalens.data import eval_transform, read_part
    from deltalens.data.transforms import image_mode
    from deltalens.lifecycle.atomic import write_text
    from deltalens.tasks import task_class
    from deltalens.training.loaders import default_workers, evaluation_loader

    model, class_names, device = load_trained(args.adapter, args.device)
    preprocessing = dl.preprocessing(model)
    info = dl.adapter_info(model)
    origin, format = info.get("split"), args.format
    files = read_part(args.data, args.split, class_names, origin, format, args.skip_broken, args.download, args.classes)
    files.transform, files.mode = eval_transform(preprocessing), image_mode(preprocessing)
    task = task_class(info.get("task"))(model, class_names).eval()
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
        results = {"adapter": args.adapter, "data": args.data, "split": args.split, "images": len(files), **values}
        if per_class:
            results["per_class"] = {name: None if value != value else value for name, value in per_class.items()}
        write_text(args.output, json.dumps(results, indent=2) + "\n")
