"""`deltalens evaluate` for adapters of segmentation, detection, instances and oriented boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import Namespace

NOT_DENSE = {
    "model": None, "checkpoint": None, "class_names": None, "templates": None, "classes": None, "votes": 0,
}  # fmt: skip
BATCH = 4


def run_dense(args: Namespace, name: str) -> None:
    """Evaluate, print, and write the results and the report that are asked for. name: of the task."""
    from deltalens.cli.dense_models import reading

    with reading(args):
        _run(args, name)


def _run(args: Namespace, name: str) -> None:
    import json

    import deltalens as dl
    from deltalens.cli.dense_models import load_dense, refuse, tiles_of
    from deltalens.cli.dense_run import print_classes
    from deltalens.data import read_part
    from deltalens.data.inputs import set_inputs
    from deltalens.lifecycle.atomic import write_text
    from deltalens.studies.dense_measure import measure
    from deltalens.training.loaders import default_workers

    refuse(args, name, NOT_DENSE)
    tiles = tiles_of(args, name)
    task, info, device = load_dense(args, name)
    files: Any = read_part(
        args.data,
        args.split,
        task.class_names,  # type: ignore[arg-type]
        info.get("split"),
        args.format,
        skip_broken=args.skip_broken,
        download=args.download,
        task=name,
    )
    set_inputs(files, dl.preprocessing(task.model))  # type: ignore[arg-type]
    workers = default_workers() if args.workers is None else args.workers
    measured = measure(task, files, args.batch_size or BATCH, workers, device, args.threshold, tiles)
    for metric, value in measured.values.items():
        print(f"{metric:<20} {value:.4f}")
    print(f"{'images':<20} {measured.images} ({args.split})")
    print_classes(measured)
    if args.output:
        results = {"adapter": args.adapter, "data": args.data, "split": args.split, "task": name}
        results |= {} if tiles is None else {"tiles": {"size": tiles.size, "gap": tiles.gap}}
        results |= {"images": measured.images, **measured.values, **measured.to_dict(args.split)}
        write_text(args.output, json.dumps(results, indent=2) + "\n")
    if args.report:
        _report(args, name, task, files, measured, device, tiles)


def _report(args: Namespace, name: str, task: Any, files: Any, measured: Any, device: Any, tiles: Any) -> None:
    from deltalens.cli.trained import label_of
    from deltalens.studies.dense_measure import examples_of
    from deltalens.studies.dense_report import DenseReport, write_dense_report
    from deltalens.studies.dense_words import task_words

    conditions = {
        "Adapter": label_of(task.model, args.adapter),
        "Data": f"{args.data}, {args.split}: {measured.images:,} images",
        "Command": f"deltalens evaluate {args.adapter} --data {args.data} --split {args.split}"
        + (f" --tile {tiles.size} --gap {tiles.gap}" if tiles else ""),
    }
    examples = examples_of(task, files, device=device, threshold=args.threshold, tiles=tiles)
    title = f"{label_of(task.model, args.adapter)}: {task_words(name)}"
    page = DenseReport(title, args.split, measured, examples, conditions)
    write_dense_report(page, args.report)
    print(f"the report is {args.report}")
