"""Trained adapters of dense tasks: which task a folder is for, and the task with its network."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from deltalens.cli.dense_options import TASKS

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from deltalens.studies.oriented_tiles import Tiles

OF_PIXELS: dict[str, Any] = {"window": None, "stride": None, "scales": [1.0], "flip": False}
OF_ORIENTED: dict[str, Any] = {"tile": None, "gap": None}
"""Options of segmentation alone, and of oriented boxes, with the value that says nothing."""
NOT_CLASSES = OF_PIXELS | OF_ORIENTED
GAP = 200


def add_inference_arguments(parser: ArgumentParser) -> None:
    """Declare how whole images are segmented, and large ones with oriented boxes looked at."""
    add = parser.add_argument
    add("--window", type=int | None, default=None, help="segmentation: by windows of this edge; else as in training")
    add("--stride", type=int | None, default=None, help="segmentation: pixels from window to window, 2/3 of it")
    add(
        "--scales", type=list[float], default=[1.0], help="segmentation: average over these factors of the image's size"
    )
    add("--flip", type=bool, default=False, help="segmentation: average with the mirrored image")
    add("--tile", type=int | None, default=None, help="oriented boxes: look at squares of this edge, and merge what is "
        "found in them")  # fmt: skip
    add("--gap", type=int | None, default=None, help=f"oriented boxes: pixels that tiles share, by default {GAP}")


def dense_task_of_adapter(folder: str) -> str | None:
    """The dense task that an adapter's folder is for; None for any other, and where the folder does not say."""
    import json
    from pathlib import Path

    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        task = config["info"]["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the command then says what is wrong with it
    return task if task in TASKS else None


def load_dense(args: Namespace, task: str) -> tuple[nn.Module, dict[str, Any], torch.device]:
    """(the task in eval mode on its device, the adapter's info, the device).

    Raises as `deltalens.from_pretrained`, ValueError for wrong windows or scales, and for those of another task.
    """
    import deltalens as dl
    from deltalens.cli.trained import load_trained
    from deltalens.tasks import Inference
    from deltalens.tasks.made import make_task

    said = {name: getattr(args, name) for name in OF_PIXELS}
    inference = None
    given = [name for name in OF_PIXELS if said[name] != OF_PIXELS[name]]
    if given and task != "segmentation":
        raise ValueError(f"--{given[0]} is for segmentation, and {args.adapter} is for {task}: leave it out")
    model, names, device = load_trained(args.adapter, args.device)
    info = dl.adapter_info(model)
    if given:
        own = info.get("inference", {}) if said["window"] is None else {}
        stride = own.get("stride") if said["stride"] is None else said["stride"]
        window = own.get("window") if said["window"] is None else said["window"]
        inference = Inference(window, stride, tuple(said["scales"]), said["flip"])
    return make_task(model, names, task, info, inference=inference).eval(), info, device


def tiles_of(args: Namespace, task: str) -> Tiles | None:
    """What --tile and --gap say. ValueError where they have no meaning for the task, or are no tiles."""
    from deltalens.studies.oriented_tiles import Tiles

    if task != "oriented":
        refuse(args, task, OF_ORIENTED)
    if args.tile is None:
        if args.gap is not None:
            raise ValueError("--gap is what tiles share: say --tile, too")
        return None
    if args.gap is None and 0 < args.tile <= GAP:
        raise ValueError(f"tiles share {GAP} pixels by default, and need a gap below their size: say --gap, too")
    return Tiles(args.tile, GAP if args.gap is None else args.gap)


def reading(args: Namespace) -> contextlib.AbstractContextManager[None]:
    """Around the reading of pictures, which are of any size where they are looked at tile by tile."""
    from deltalens.data.dense_checks import any_size

    return contextlib.nullcontext() if args.tile is None else any_size()


def refuse(args: Namespace, task: str, plain: dict[str, Any]) -> None:
    """ValueError for an option that says something and has no meaning for the task. plain: option -> the value that
    says nothing."""
    for name, nothing in plain.items():
        if getattr(args, name) != nothing:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for {task}: leave it out")
