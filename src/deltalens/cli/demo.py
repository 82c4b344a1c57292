"""Compare methods with an embedded backbone, and write a report.

Linear probing, LoRA, VPT-deep, Mona and full fine-tuning teach the same small backbone scikit-learn's digit scans,
with the same images, epochs and search for the learning rate. With --task clip, few-shot methods teach a small CLIP
half of the classes of drawn shapes, and are tested on these and on the other half. With --task points, methods teach a
small point transformer ten kinds of generated solids. With --task segmentation or detection, methods teach a small
Swin under a dense head the shapes in generated scenes, with --task oriented vehicles seen from above. Nothing is
downloaded. The result is a table, and a folder with report.html, results.json and one adapter for each method.
"""

from __future__ import annotations

import shlex
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from deltalens.studies.demo import MakeBackbone

DEFAULTS = {
    "task": "classification",
    "output": "./deltalens-demo",
    "model": "deltalens/vit-mini",
    "img_size": 32,
    "methods": ["linear", "lora", "vpt", "mona", "full"],
    "epochs": 12,
    "train_images": 400,
    "shots": 16,
    "seed": 0,
    "tune": False,
    "open": False,
}
DEFAULTS_OF: dict[str, dict[str, Any]] = {  # where a task has others
    "clip": {
        "model": "deltalens/clip-mini",
        "img_size": None,
        "methods": ["zero_shot", "coop", "clip_adapter", "tip_adapter", "lora", "mma"],
        "epochs": 10,
    },
    "points": {
        "model": "deltalens/points-mini",
        "img_size": None,
        "methods": ["linear", "lora", "vpt", "adaptformer", "adapter_x", "full"],
        "epochs": 10,
        "train_images": 150,
    },
}
for _task, _epochs, _scenes, _size in (
    ("segmentation", 6, 100, 64), ("detection", 6, 100, 64), ("oriented", 4, 160, 80),
):  # fmt: skip
    DEFAULTS_OF[_task] = {
        "model": "deltalens/swin-mini",
        "img_size": _size,
        "methods": ["linear", "lora", "adaptformer", "mona", "full"],
        "epochs": _epochs,
        "train_images": _scenes,
    }
DEFAULTS_OF["oriented"]["methods"] = ["linear", "lora", "mona", "full"]  # two stages take longer


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""

    def add(option: str, **kwargs: Any) -> None:
        parser.add_argument(option, default=DEFAULTS[option.removeprefix("--").replace("-", "_")], **kwargs)

    add("--task", type=Literal[tuple(TASKS)], help="digits, base-to-novel with texts, solids as clouds, or scenes")
    add("--output", type=str, help="folder for the report and the adapters")
    add("--model", type=str, help="the backbone (deltalens list models)")
    add("--img-size", type=int | None, help="edge of the input images in pixels; null for the model's own")
    add("--methods", type=str, nargs="+", help="which methods, in which order (deltalens list methods)")
    add("--epochs", type=int, help="passes over the training images")
    add(
        "--train-images",
        type=int,
        help="images, clouds or scenes to train on, at least 10; with --task clip see --shots",
    )
    add("--shots", type=int, help="with --task clip: training pictures of each base class")
    add("--seed", type=int, help="of initialisation, order and dropout; the split of the images stays the same")
    add(
        "--tune",
        action="store_true",
        help="search every method's learning rate on the validation images (8 times as long)",
    )
    add("--open", action="store_true", help="open the report in the browser")


def translate(argv: list[str]) -> list[str]:
    """Put the defaults of the task that is named in front, so that what is said counts."""
    words = [part for word in argv for part in word.split("=", 1)]
    task = [DEFAULTS["task"], *(after for word, after in pairwise(words) if word == "--task")][-1]
    return [*_as_words(DEFAULTS_OF.get(task, {})), *argv]


def run(args: Namespace) -> None:
    """Run the demonstration, print its table, and say where the report is."""
    from pathlib import Path

    from rich.console import Console

    from deltalens.studies.demo import REPORT

    console = Console()
    table = TASKS[args.task](args, console)
    console.print()
    console.print(table)
    report = Path(args.output) / REPORT
    console.print(f"\nreport: {report}", highlight=False, soft_wrap=True)
    if args.open:
        import webbrowser

        webbrowser.open(report.resolve().as_uri())


def _classification(args: Namespace, console: Console) -> Table:
    from deltalens.studies.demo import DemoSettings, run_demo
    from deltalens.studies.terminal import comparison_table

    settings = DemoSettings(args.model, tuple(args.methods), args.epochs, args.train_images, args.seed, args.tune)
    console.print(
        f"{args.model} learns handwritten digits: {args.train_images} images, {args.epochs} epochs\n", highlight=False
    )

    return comparison_table(run_demo(settings, _classifiers(args), args.output, command_line(args), console))


def _clip(args: Namespace, console: Console) -> Table:
    from deltalens.cli.sized_backbone import create_sized_backbone
    from deltalens.studies.clip_demo import ClipSettings, run_clip_demo
    from deltalens.studies.terminal import clip_table

    if args.train_images != DEFAULTS["train_images"]:
        raise ValueError("--train-images is for the digits: with --task clip say --shots, pictures of each base class")
    settings = ClipSettings(args.model, tuple(args.methods), args.epochs, args.shots, args.seed, args.tune)
    console.print(
        f"{args.model} learns half of the classes of drawn shapes: {args.shots} pictures of each, {args.epochs} "
        "epochs\n",
        highlight=False,
    )

    def make(class_names: list[str], template: str) -> tuple[nn.Module, dict[str, Any]]:
        return create_sized_backbone(
            args.model, len(class_names), args.img_size, class_names=class_names, templates=template
        )

    return clip_table(run_clip_demo(settings, make, args.output, command_line(args), console))


def _points(args: Namespace, console: Console) -> Table:
    from deltalens.studies.points_demo import PointsSettings, run_points_demo
    from deltalens.studies.terminal import comparison_table

    settings = PointsSettings(args.model, tuple(args.methods), args.epochs, args.train_images, args.seed, args.tune)
    console.print(
        f"{args.model} learns generated solids: {args.train_images} clouds, {args.epochs} epochs\n", highlight=False
    )

    return comparison_table(run_points_demo(settings, _classifiers(args), args.output, command_line(args), console))


def _classifiers(args: Namespace) -> MakeBackbone:
    from deltalens.cli.sized_backbone import create_sized_backbone

    return lambda num_classes: create_sized_backbone(args.model, num_classes, args.img_size)


def _dense(args: Namespace, console: Console) -> Table:
    from deltalens.cli.dense_training import create_network
    from deltalens.studies.dense_demo import DenseSettings, run_dense_demo
    from deltalens.studies.terminal import comparison_table

    size = args.img_size or 64
    amounts = (args.epochs, args.train_images, args.seed, args.tune)
    settings = DenseSettings(args.model, tuple(args.methods), *amounts, task=args.task, size=size)
    what = "oriented boxes" if args.task == "oriented" else args.task
    console.print(
        f"{args.model} learns {what} of generated scenes: {args.train_images} scenes, {args.epochs} epochs\n",
        highlight=False,
    )

    def make(num_classes: int, head: str, head_options: dict[str, Any]) -> nn.Module:
        options = {"model": args.model, "img_size": size, "head": head, "head_options": head_options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's remarks on how timm resizes tables of positions
            return create_network(options | {"pretrained": True}, num_classes)

    return comparison_table(run_dense_demo(settings, make, args.output, command_line(args), console))


TASKS = {
    "classification": _classification,
    "clip": _clip,
    "points": _points,
    "segmentation": _dense,
    "detection": _dense,
    "oriented": _dense,
}


def command_line(args: Namespace) -> str:
    """The shortest command that runs the same."""
    defaults = DEFAULTS | DEFAULTS_OF.get(args.task, {})
    said = {name: getattr(args, name) for name in DEFAULTS if name not in ("output", "open")}
    changed = {name: value for name, value in said.items() if value != defaults[name]}
    return shlex.join(["deltalens", "demo", *_as_words(changed)])


def _as_words(options: dict[str, Any]) -> list[str]:
    """{"img_size": None, "tune": True} -> ["--img-size", "null", "--tune"]."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += ["null" if each is None else str(each) for each in values]
    return words
