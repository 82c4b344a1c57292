"""`deltalens train` for segmentation, detection and instances: train, measure class by class, write the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from deltalens.data.splits import Splits
    from deltalens.training.output import Output


def run_dense(
    options: dict[str, Any], methods: list[Any], data: Splits, output: Output, resume: bool, overwrite: bool
) -> None:
    """Train on data that were read, print what came out, and leave adapter, results and report in the folder."""
    from deltalens.cli.dense_training import build_dense_task, fitted_to_data, measured_part
    from deltalens.cli.train import settings_of
    from deltalens.cli.training_words import print_results, print_start
    from deltalens.studies.dense_measure import Measured, measure
    from deltalens.training import fit
    from deltalens.training.output import is_main_process

    options = fitted_to_data(options, data)
    task = build_dense_task(options, methods, data)
    settings = settings_of(options)
    part = measured_part(data)
    if is_main_process():
        print_start(task, data, options)
        print(_setting(options))
    measured: list[Measured] = []

    def by_class() -> dict[str, Any]:
        if part is None or not is_main_process():
            return {}
        device = _device(options)
        measured.append(measure(task.to(device), getattr(data, part), settings.batch_size, settings.workers, device))
        task.cpu()
        return {"task": data.task, "head": options["head"], **measured[0].to_dict(part)}

    results = fit(
        task, data, settings, output.folder, resume=resume, overwrite=overwrite, config=options, more_results=by_class
    )
    if not is_main_process():
        return
    print_results(results, output)
    if measured:
        print_classes(measured[0])
    if measured and options["report"]:
        _report(task, data, part, options, results, measured[0], output)


def print_classes(measured: Any) -> None:
    """A line for each class, with its columns."""
    width = max(map(len, measured.per_class), default=0)
    columns = measured.columns
    print(f"  {'':<{width}}" + "".join(f"{name:>16}" for name in columns))
    for name, row in measured.per_class.items():
        print(f"  {name:<{width}}" + "".join(f"{measured.text(column, row[column]):>16}" for column in columns))


def _setting(options: dict[str, Any]) -> str:
    from deltalens.studies.dense_words import task_words

    how = (
        f"{options['head']} for {task_words(options['task'])}, batches of {options['batch_size']}, "
        f"learning rate {options['lr']:g}"
    )
    return f"{how}, crops of {options['crop_size']} px" if options.get("crop_size") else how


def _device(options: dict[str, Any]) -> str:
    """Where the trained task is measured class by class: where it was trained, or the fastest there is."""
    from deltalens.cli.trained import chosen_device

    names = {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}
    return chosen_device(names.get(options["accelerator"]))


def _counted(data: Splits) -> str:
    """How many images there are to train, to validate and to test with."""
    parts = (("training", data.train), ("validation", data.val), ("test", data.test))
    return ", ".join(f"{len(part):,} {name}" for name, part in parts if part is not None)


def _report(
    task: nn.Module,
    data: Splits,
    part: Any,
    options: dict[str, Any],
    results: dict[str, Any],
    measured: Any,
    output: Output,
) -> None:
    from deltalens.studies.dense_measure import examples_of
    from deltalens.studies.dense_report import DenseReport, write_dense_report
    from deltalens.studies.dense_words import task_words
    from deltalens.training.output import REPORT

    count = results["parameters"]
    methods = " + ".join(entry["method"] for entry in options["method"])
    epochs = f"{options['epochs']} epoch{'s' if options['epochs'] > 1 else ''}"
    conditions = {
        "Model": f"{options['model']} under {options['head']}",
        "Method": f"{methods}: {count['adapter']:,} parameters, {count['percent']:.2f} % of the backbone's "
        f"{count['backbone']:,}; the head's {count['head']:,} are trained, too",
        "Data": f"{options['data']}: {_counted(data)} images",
        "Training": f"{epochs}, batches of {options['batch_size']}, learning rate {options['lr']:g}, "
        f"seed {options['seed']}, {results['seconds']['training']:,.0f} s on {results['machine']}",
        "Command": f"deltalens train --config {output.config} --output ANOTHER",
    }
    file = output.folder / REPORT
    title = f"{methods} on {options['model'].rpartition('/')[2]}: {task_words(str(data.task))}"
    page = DenseReport(title, part, measured, examples_of(task, getattr(data, part)), conditions, results["history"])
    write_dense_report(page, file)
    print(f"the report is {file}")
