"""Write the EMA weights of a checkpoint into the package: float16 safetensors, facts as JSON, and the card."""

import csv
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deltalens.backbones.shipped import WEIGHTS, weights_file

from . import card, checkpoint, models
from .data import class_names, load_split
from .evaluate import accuracy

NOT_RECIPE = {
    "command",
    "model",
    "data",
    "output",
    "resume",
    "device",
    "threads",
    "log_steps",
    "save_minutes",
    "early_sizes",
}


def export(args: Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    state = checkpoint.read(Path(args.checkpoint))
    short_name = state["args"]["model"]
    target = weights_file(models.timm_name(short_name))
    partial = target.with_name("partial-" + target.name)
    save_file({name: tensor.half().contiguous() for name, tensor in state["ema"].items()}, partial)

    model = timm.create_model(
        models.timm_name(short_name), pretrained=True, pretrained_cfg_overlay={"file": str(partial)}
    )
    facts = describe(short_name, model, state, Path(args.data))
    facts["image_sizes"] = image_sizes(Path(args.checkpoint).with_name("log.csv"))
    partial.chmod(0o644)  # save_file makes it private
    partial.replace(target)
    card.write(target.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    card.write_card(WEIGHTS)
    print(target.name, f"{target.stat().st_size / 2**20:.2f} MiB", {split: facts[split] for split in ("val", "test")})


def describe(short_name: str, model: nn.Module, state: dict[str, Any], data: Path) -> dict[str, Any]:
    """What a user should know of a file: size, accuracy, recipe, class names."""
    args, size = state["args"], models.native_size(short_name)
    budget_share = state["elapsed"] / 60 / args["budget_minutes"] if args["budget_minutes"] else 0.0
    return {
        "name": short_name,
        "timm_name": models.timm_name(short_name),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_size": size,
        **{split: accuracy(model, *load_split(data, split), size) for split in ("val", "test")},
        "epochs": round(state["epochs"], 2),
        "schedule_done": round(min(1.0, max(state["epochs"] / args["epochs"], budget_share)), 3),
        "hours": round(state["elapsed"] / 3600, 2),
        "recipe": {key: value for key, value in args.items() if key not in NOT_RECIPE},
        "class_names": class_names(data),
    }


def image_sizes(log: Path) -> list[int]:
    """The sizes trained at, in order; from the log, since a resumed run may have got other arguments."""
    with log.open(newline="") as file:
        return list(dict.fromkeys(int(row["image_size"]) for row in csv.DictReader(file)))
