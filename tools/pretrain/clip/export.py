"""Write the EMA weights of a CLIP's checkpoint into the package, with its facts and the card."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltalens.backbones.class_prompts import IMAGENET_SELECT
from deltalens.backbones.open_clip import mini

from .. import card, checkpoint
from ..data import class_names, load_split
from .captions import DRAWN_TEMPLATES, MORE_TEMPLATES, drawn_pictures
from .evaluate import drawn_accuracy, photograph_accuracy

NOT_RECIPE = {"command", "data", "output", "resume", "threads", "log_steps", "save_minutes", "held_out_pictures"}
NAME = "clip-mini"


def export(args: Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    state = checkpoint.read(Path(args.checkpoint))
    write_weights(state, mini.WEIGHTS)
    facts = describe(state, Path(args.data))
    target = mini.WEIGHTS.with_suffix(".json")
    card.write(target, json.dumps(facts, indent=1) + "\n")
    card.write_card(target.parent)
    print(
        mini.WEIGHTS.name,
        f"{mini.WEIGHTS.stat().st_size / 2**20:.2f} MiB",
        {split: facts[split] for split in ("val", "test", "held_out_drawings")},
    )


def write_weights(state: dict[str, Any], target: Path) -> None:
    """In float16 but for the spread of the token rows, which all unseen rows are scaled with, and the numbers."""
    ids = state["token_ids"]
    weights = dict(state["ema"])
    table = torch.zeros(mini.CONFIG["text_cfg"]["vocab_size"], weights[mini.TABLE].shape[1])
    table[ids] = weights[mini.TABLE]
    packed = mini.packed(weights | {mini.TABLE: table}, ids)
    kept = (mini.IDS, mini.SPREAD)
    partial = target.with_name("partial-" + target.name)
    save_file({k: (t if k in kept else t.half()).contiguous() for k, t in packed.items()}, partial)
    partial.chmod(0o644)  # save_file makes it private
    partial.replace(target)


def describe(state: dict[str, Any], data: Path) -> dict[str, Any]:
    """What a user should know of the file, measured with the file itself."""
    args, names = state["args"], class_names(data)
    clip = mini.create(pretrained=True, checkpoint=None, options={})
    rows = len(state["token_ids"])
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    tokens = mini.tokenizer()
    held_out = drawn_pictures(args["held_out_pictures"], args["seed"] + 1, held_out=True)
    done = max(state["elapsed"] / 60 / args["budget_minutes"] if args["budget_minutes"] else 0.0, 0.0)
    return {
        "name": NAME,
        "library": "open_clip",
        "parameters": parameters,
        "stored_parameters": parameters
        - clip.token_embedding.weight.numel()
        + rows * clip.token_embedding.embedding_dim,
        "stored_token_rows": rows,
        "input_size": mini.PREPROCESSING["size"],
        "config": mini.CONFIG,
        **{split: photograph_accuracy(clip, tokens, *load_split(data, split), names) for split in ("val", "test")},
        "held_out_drawings": drawn_accuracy(clip, tokens, *held_out),
        "templates": list(IMAGENET_SELECT),
        "training_templates": [*IMAGENET_SELECT, *MORE_TEMPLATES],
        "drawing_templates": list(DRAWN_TEMPLATES),
        "epochs": round(state["epochs"], 2),
        "schedule_done": round(min(1.0, max(done, state["epochs"] / args["epochs"])), 3),
        "text_steps": state["text_steps"],
        "hours": round(state["elapsed"] / 3600, 2),
        "recipe": {key: value for key, value in args.items() if key not in NOT_RECIPE},
        "class_names": names,
    }
