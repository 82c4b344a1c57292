"""Weights of a point transformer from files as the authors published them, or as deltalens and the hub have them.

====================================  ==================================================================
file                                  names of the encoder's tensors
====================================  ==================================================================
Point-MAE, ReCon, pretrained          `MAE_encoder.<name>`; the decoder is left out
ACT, pretrained                       `ACT_encoder.<name>`; the same
Point-BERT, pretrained                `transformer_q.<name>`, else its average `transformer_k.<name>`
fine-tuned by any of them             `<name>`
hub, of torch-pointcloud              see `hub_names.py`
====================================  ==================================================================

Pickles are read with weights_only=True. They hold the tensors under "base_model", with "module." in front where they
were trained on several GPUs.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltalens.backbones.points import hub_names
from deltalens.models.point_transformer import PointTransformer

PREFIXES = ("MAE_encoder.", "ACT_encoder.", "transformer_q.", "transformer_k.", "")
AROUND = ("base_model", "model", "state_dict")
HEAD = "cls_head_finetune."
SEED = 0  # of class tokens that a file lacks: the same in every process, so that adapters find them again
log = logging.getLogger(__name__)


def load_published(model: PointTransformer, path: str | os.PathLike, own_classes: bool = False) -> None:
    """Load a file's tensors into a model by their names; what is not the encoder's is left out.

    A head is taken where it fits, and stays fresh elsewhere; own_classes: the model first gets as many classes as the
    file's head has. Class tokens that a file lacks (`cls_token` and `cls_pos`, in Point-MAE's pretrained one) are drawn
    as published, always with the same numbers, and are then trained with every adapter (`model.untrained`); a warning
    of the logger says so.

    Raises ValueError where anything else is missing or of another shape, naming it.
    """
    found = encoder_tensors(_read(path))
    if own_classes:
        _take_classes(model, found)
    wanted = model.state_dict()
    head_fits = all(name in found and found[name].shape == wanted[name].shape for name in wanted if _in_head(name))
    kept = {name: tensor for name, tensor in found.items() if name in wanted and (head_fits or not _in_head(name))}
    missing = [name for name in wanted if name not in kept and not _in_head(name)]
    absent = tuple(name for name in missing if name in model.class_token_names())
    _refuse_others(path, kept, wanted, [name for name in missing if name not in absent])
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in kept.items()}, strict=False)
    model.untrained = absent
    if absent:
        model.init_class_tokens(absent, seed=SEED)
        log.warning(
            "%s has no %s: drawn from a normal distribution (std .02), and trained with every adapter",
            os.fspath(path),
            ", ".join(absent),
        )


def encoder_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a checkpoint, under the names of `PointTransformer`. ValueError where there is none."""
    for prefix in PREFIXES:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if "encoder.first_conv.0.weight" in found:
            return found
    if (renamed := hub_names.encoder_tensors(tensors)) is not None:
        return renamed
    raise ValueError(
        "no point transformer in this file: there is no encoder.first_conv.0.weight, neither under "
        f"{', '.join(prefix for prefix in PREFIXES if prefix)} nor without a prefix; it holds "
        f"{', '.join(list(tensors)[:3])}"
    )


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    content: Any
    if os.fspath(path).endswith(".safetensors"):
        content = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    for key in AROUND:
        if isinstance(content.get(key), dict):
            content = content[key]
    named = {name.removeprefix("module."): tensor for name, tensor in content.items() if torch.is_tensor(tensor)}
    return {name.removeprefix("base_model."): tensor for name, tensor in named.items()}


def _take_classes(model: PointTransformer, found: dict[str, Tensor]) -> None:
    """Give the model as many classes as the head of a file has, where it has one."""
    biases = [name for name in found if _in_head(name) and name.endswith(".bias")]
    if biases:
        last = max(biases, key=lambda name: int(name.removeprefix(HEAD).partition(".")[0]))
        model.reset_classifier(len(found[last]))


def _refuse_others(
    path: str | os.PathLike, kept: dict[str, Tensor], wanted: dict[str, Tensor], lacking: list[str]
) -> None:
    wrong = [
        f"{name} is {tuple(tensor.shape)}, and {tuple(wanted[name].shape)} here"
        for name, tensor in kept.items()
        if tensor.shape != wanted[name].shape
    ]
    if wrong or lacking:
        problem = f"lacks {len(lacking)} tensors, such as {lacking[0]}" if lacking else f"does not fit: {wrong[0]}"
        raise ValueError(
            f"{os.fspath(path)} {problem}. It belongs to another point transformer: points/point-mae, "
            "points/point-bert, points/act and points/recon differ, and so do dim, depth and encoder_dim"
        )


def _in_head(name: str) -> bool:
    return name.startswith(HEAD)
