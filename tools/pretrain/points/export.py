"""Write the EMA weights of a masked autoencoder's encoder into the package, with its facts and the card."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import deltalens as dl
from deltalens.backbones.points import mini
from deltalens.models.point_transformer import PointTransformer

from .. import card, checkpoint
from .probe import largest_class, linear_svm
from .voxels import VoxelShapes, class_names

NOT_RECIPE = {"command", "data", "output", "resume", "threads", "log_steps", "save_minutes"}
ENCODER = "MAE_encoder."


def export(args: Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    state = checkpoint.read(Path(args.checkpoint))
    write_weights(state["ema"], mini.WEIGHTS)
    facts = describe(state, Path(args.data))
    target = mini.WEIGHTS.with_suffix(".json")
    card.write(target, json.dumps(facts, indent=1) + "\n")
    card.write_card(target.parent)
    print(mini.WEIGHTS.name, f"{mini.WEIGHTS.stat().st_size / 2**20:.2f} MiB", facts["linear_svm"])


def write_weights(ema: dict[str, torch.Tensor], target: Path) -> None:
    """The encoder in float16, without a head; counters as they are."""
    encoder = {name.removeprefix(ENCODER): tensor for name, tensor in ema.items() if name.startswith(ENCODER)}
    halved = {name: t.half() if t.is_floating_point() else t for name, t in encoder.items()}
    partial = target.with_name("partial-" + target.name)
    save_file({name: tensor.contiguous() for name, tensor in halved.items()}, partial)
    partial.chmod(0o644)  # save_file makes it private
    partial.replace(target)


def describe(state: dict[str, Any], data: Path) -> dict[str, Any]:
    """What a user should know of the file, measured with the file itself."""
    args = state["args"]
    model = dl.create_backbone(mini.NAME, num_classes=0)
    torch.manual_seed(0)
    untrained = PointTransformer(0, **mini.CONFIG)
    train, others = VoxelShapes(data, "train"), {split: VoxelShapes(data, split) for split in ("val", "test")}
    done = state["elapsed"] / 60 / args["budget_minutes"] if args["budget_minutes"] else 0.0
    return {
        "name": "points-mini",
        "kind": "points",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_points": mini.NUM_POINTS,
        "config": mini.CONFIG,
        "shapes": {"train": len(train), **{split: len(shapes) for split, shapes in others.items()}},
        "linear_svm": linear_svm(model, train, others, mini.NUM_POINTS),
        "linear_svm_untrained": linear_svm(untrained, train, others, mini.NUM_POINTS),
        "largest_class": {split: largest_class(shapes) for split, shapes in others.items()},
        "epochs": round(state["epochs"], 2),
        "schedule_done": round(min(1.0, max(done, state["epochs"] / args["epochs"])), 3),
        "hours": round(state["elapsed"] / 3600, 2),
        "recipe": {key: value for key, value in args.items() if key not in NOT_RECIPE},
        "class_names": class_names(data),
    }
