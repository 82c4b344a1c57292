"""What `train` prints at its start and at its end."""

from __future__ import annotations

from typing import Any


def print_start(task, data, options: dict[str, Any]) -> None:
    """What is trained, on what."""
    import deltalens as dl
    from deltalens.data.inputs import IMAGES, kind_of
    from deltalens.training.optim import trains_nothing

    inputs = "images" if kind_of(dl.preprocessing(task.model)) == IMAGES else "clouds"
    count = dl.count_parameters(task.model)
    names = " + ".join(entry["method"] for entry in options["method"])
    val, test = (
        f"no {name}" if part is None else f"{len(part)} {name}"
        for name, part in (("validation", data.val), ("test", data.test))
    )
    print(
        f"{names} on {options['model']}: {count.adapter:,} parameters, {count.percent:.2f} % of the backbone's "
        f"{count.backbone:,}, and {count.head:,} in the head"
    )
    classes = f"{len(data.class_names)} class{'' if len(data.class_names) == 1 else 'es'}"
    print(f"{classes}, {len(data.train)} training, {val}, {test} {inputs}")
    if trains_nothing(task):
        print("nothing is trained: the adapter is made of the training images, without epochs")


def print_results(results: dict[str, Any], output) -> None:
    """What came out, and where it is."""
    for part in ("val", "test"):
        if results[part]:
            print(f"{part:<5}" + "  ".join(f"{name} {value:.4f}" for name, value in results[part].items()))
    for method, values in results.get("chosen", {}).items():
        print(f"{method} chose " + ", ".join(f"{name} {value:g}" for name, value in values.items()))
    files = "adapter, results.json and metrics.csv" if results["history"] else "adapter and results.json"
    print(f"{files} are in {output.folder}")
