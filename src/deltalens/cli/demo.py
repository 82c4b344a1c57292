"""Compare methods on real images with an embedded backbone, and write a report.

Linear probing, LoRA, VPT-deep, Mona and full fine-tuning teach the same small backbone scikit-learn's digit scans,
with the same images, epochs and search for the learning rate. Nothing is downloaded. The result is a table, and a
folder with report.html, results.json and one adapter for each method.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

TASKS = {"classification": "deltalens.studies.demo"}  # modules with DemoSettings, run_demo and REPORT
DEFAULTS = {
    "task": "classification",
    "output": "./deltalens-demo",
    "model": "deltalens/vit-mini",
    "img_size": 32,
    "methods": ["linear", "lora", "vpt", "mona", "full"],
    "epochs": 12,
    "train_images": 400,
    "seed": 0,
    "tune": False,
    "open": False,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""

    def add(option: str, **kwargs: Any) -> None:
        parser.add_argument(option, default=DEFAULTS[option.removeprefix("--").replace("-", "_")], **kwargs)

    add("--task", type=Literal[tuple(TASKS)], help="what to demonstrate")
    add("--output", type=str, help="folder for the report and the adapters")
    add("--model", type=str, help="the backbone (deltalens list models)")
    add("--img-size", type=int | None, help="edge of the input images in pixels; null for the model's own")
    add("--methods", type=str, nargs="+", help="which methods, in which order (deltalens list methods)")
    add("--epochs", type=int, help="passes over the training images")
    add("--train-images", type=int, help="how many images to train on, 10 to 1097")
    add("--seed", type=int, help="of initialisation, order and dropout; the split of the images stays the same")
    add(
        "--tune",
        action="store_true",
        help="search every method's learning rate on the validation images (8 times as long)",
    )
    add("--open", action="store_true", help="open the report in the browser")


def run(args: Namespace) -> None:
    """Run the demonstration, print its table, and say where the report is."""
    from importlib import import_module
    from pathlib import Path

    from rich.console import Console

    from deltalens.cli.sized_backbone import create_sized_backbone
    from deltalens.studies.terminal import comparison_table

    demo = import_module(TASKS[args.task])
    settings = demo.DemoSettings(args.model, tuple(args.methods), args.epochs, args.train_images, args.seed, args.tune)
    console = Console()
    console.print(
        f"{args.model} learns handwritten digits: {args.train_images} images, {args.epochs} epochs\n", highlight=False
    )
    comparison = demo.run_demo(
        settings,
        lambda num_classes: create_sized_backbone(args.model, num_classes, args.img_size),
        args.output,
        command_line(args),
        console,
    )
    console.print()
    console.print(comparison_table(comparison))
    report = Path(args.output) / demo.REPORT
    console.print(f"\nreport: {report}", highlight=False, soft_wrap=True)
    if args.open:
        import webbrowser

        webbrowser.open(report.resolve().as_uri())


def command_line(args: Namespace) -> str:
    """The shortest command that runs the same."""
    words = ["deltalens", "demo"]
    for name, default in DEFAULTS.items():
        value = getattr(args, name)
        if value == default or name in ("output", "open"):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += (
                [str(each) for each in value] if isinstance(value, list) else ["null" if value is None else str(value)]
            )
    return shlex.join(words)
