"""Options of `train` that are for masks, boxes, instances and oriented boxes, and what they make of the others."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

TASKS = ("segmentation", "detection", "instance", "oriented")
HEADS = {
    "segmentation": ("upernet", "fcn", "dpt", "setr_pup"),
    "detection": ("retinanet", "fcos", "cascade_rcnn"),
    "instance": ("mask_rcnn", "cascade"),
    "oriented": ("oriented_rcnn", "oriented_retinanet", "h2rbox_v2"),
}
"""Task -> the heads that serve it, the default first."""
BATCH_SIZE = {"segmentation": 8, "detection": 4, "instance": 4, "oriented": 4}
LEARNING_RATE = {"segmentation": 5e-4, "detection": 2e-4, "instance": 2e-4, "oriented": 2e-4}
"""At most; the method's own where that is smaller."""
OF_PIXELS, OF_OBJECTS, OF_ORIENTED = TASKS[:1], TASKS[1:], TASKS[3:]


@dataclass(frozen=True)
class Option:
    """One option of dense tasks. tasks: those it has a meaning for."""

    name: str
    type: Any
    default: Any
    tasks: tuple[str, ...]
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


OPTIONS = (
    Option("head", str | None, None, TASKS, "upernet, fcn, dpt, setr_pup; retinanet, fcos, cascade_rcnn; mask_rcnn, "
           "cascade; oriented_rcnn, oriented_retinanet, h2rbox_v2. By default the first of the task's; its settings "
           "follow as --head.SETTING VALUE"),
    Option("head_options", dict | None, None, TASKS, "the head's settings as one mapping, for YAML"),
    Option("test_size", list[int] | None, None, TASKS, "[short, long]: resize pictures of evaluation to the largest "
           "size with at most these sides"),
    Option("long_side", int | None, None, TASKS, "largest long side of training pictures"),
    Option("crop_size", int | None, None, OF_PIXELS, "edge of training crops; by default the short side of the "
           "pictures, at most 512"),
    Option("scale", list[float], [0.5, 2.0], OF_PIXELS, "range of the random factor that training pictures are "
           "resized by"),
    Option("short_side", int | None, None, OF_PIXELS, "what the factor multiplies: pictures resized to this side"),
    Option("max_class_share", float, 0.75, OF_PIXELS, "crops with more of one class are drawn again"),
    Option("photometric", bool, True, OF_PIXELS, "change brightness, contrast, saturation and hue"),
    Option("ignore_index", int | None, None, OF_PIXELS, "a value of masks that stands for no class, besides 255"),
    Option("auxiliary_weight", float, 0.4, OF_PIXELS, "of the auxiliary head's loss"),
    Option("window", int | None, None, OF_PIXELS, "evaluate by windows of this edge instead of whole images"),
    Option("stride", int | None, None, OF_PIXELS, "pixels from window to window, by default 2/3 of the edge"),
    Option("short_sides", list[int] | None, None, OF_OBJECTS, "one of these short sides is drawn for every training "
           "picture; by default their own size, at most 800 x 1333"),
    Option("random_crop", bool, False, OF_OBJECTS, "also crop half of the training pictures, as DETR does"),
    Option("min_box", float, 1.0, OF_OBJECTS, "smaller boxes are not trained on, in pixels"),
    Option("difficult", bool, False, OF_OBJECTS, "also train on objects marked as difficult"),
    Option("flips", list[float], [0.25, 0.25, 0.25], OF_ORIENTED, "probabilities of a horizontal, a vertical and a "
           "diagonal flip, of which at most one is made"),
    Option("rotation", float, 0.0, OF_ORIENTED, "probability that a training picture is turned about its middle"),
    Option("rotation_angles", list[float] | None, None, OF_ORIENTED, "in degrees, one of which is drawn; any"
           " by default"),
    Option("kept_share", float, 0.7, OF_ORIENTED, "objects with less of their area in a crop are not trained on"),
)  # fmt: skip
REPORT = Option("report", bool, True, TASKS, "write report.html: per-class table, confusion, example pictures")
# What has no meaning for dense tasks, with the value that says nothing
NOT_DENSE = {
    "templates": None, "descriptions": None, "tower": None, "num_points": None, "normalize": None, "min_crop": 0.5,
    "rand_augment": 0, "cloud_augment": "scale+shift", "label_smoothing": 0.0, "cache_features": None,
}  # fmt: skip


def add_arguments(parser: ArgumentParser, report: bool = True) -> None:
    """Declare --task and the options of dense tasks. report: --report, too."""
    parser.add_argument(
        "--task",
        type=Literal[("classification", "multilabel", *TASKS)] | None,
        default=None,
        help="what is learned; by default what --head is for, or what the data are laid out for",
    )
    for option in (*OPTIONS, *([REPORT] if report else [])):
        parser.add_argument(option.flag, type=option.type, default=option.default, help=option.help)


def translate(argv: list[str]) -> list[str]:
    """Gather `--head.SETTING VALUE` words into one `--head-options JSON` word pair. UsageError for one without a
    value."""
    import yaml

    from deltalens.cli.main import UsageError

    rest, settings, words = [], {}, iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if not option.startswith("--head."):
            rest.append(word)
            continue
        value = value if equals else next(words, None)
        if value is None:
            raise UsageError(f"{option} needs a value")
        settings[option.removeprefix("--head.").replace("-", "_")] = yaml.safe_load(value)
    return rest + (["--head-options", json.dumps(settings)] if settings else [])


def dense_task_of(options: dict[str, Any]) -> str | None:
    """The dense task that is asked for, or that the head is for, or the data are laid out for; None for any other."""
    from pathlib import Path

    from deltalens.data.dense_formats import DENSE_FORMATS, dense_task
    from deltalens.data.formats import recognise

    asked = options.get("task")
    if asked is not None:
        return asked if asked in TASKS else None
    of_head = [task for task, heads in HEADS.items() if options.get("head") in heads]
    if of_head:
        return of_head[0]
    root, format = Path(options["data"]).expanduser(), options["format"]
    if format == "auto":
        format = recognise(root) or "folder" if root.exists() else "folder"
    return dense_task(format, root, None) if format in DENSE_FORMATS else None


def check_meaning(task: str | None, options: dict[str, Any]) -> None:
    """ValueError for an option that says something and has no meaning for the task. task: None for those of one label
    or several."""
    for option in OPTIONS:
        said = option.name in options and options[option.name] != option.default
        if said and task not in option.tasks:
            raise ValueError(
                f"{option.flag} is for {', '.join(option.tasks)}, and the task is {task or 'classification'}: leave it "
                "out, or say --task"
            )
    if task is None:
        return
    for name, plain in NOT_DENSE.items():
        if options.get(name, plain) != plain:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for {task}: leave it out")


def settled(task: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The task's options with the defaults of the task written out; those that have no meaning for it are left out."""
    dense = {option.name: option for option in (*OPTIONS, REPORT)}
    kept = {name: value for name, value in options.items() if name not in dense or task in dense[name].tasks}
    if task is None:
        return kept
    heads = HEADS[task]
    head = heads[0] if kept["head"] is None else kept["head"]
    if head not in heads:
        other = next((each for each, names in HEADS.items() if head in names), None)
        near = difflib.get_close_matches(head, heads, 1)
        hint = f"it is for {other}" if other else f"did you mean {near[0]}?" if near else "there is no such head"
        raise ValueError(f"{head!r} is no head for {task} ({hint}), which has {', '.join(heads)}")
    pairs = {"test_size": "short, long", "scale": "smallest, largest"}
    for name, said in pairs.items():
        if kept.get(name) is not None and (len(kept[name]) != 2 or kept[name][0] > kept[name][1]):
            raise ValueError(f"--{name.replace('_', '-')} is two numbers, [{said}], got {kept[name]}")
    return kept | {"task": task, "head": head, "head_options": dict(kept["head_options"] or {})}
