"""Point transformers by name: `points/point-mae[.<tag>]`, `points/point-bert`, `points/act`, `points/recon`, and
`deltalens/points-mini`, which comes with the package."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltalens.backbones.points import mini
from deltalens.backbones.points.checkpoint import load_published
from deltalens.backbones.points.hub_names import FILE, REPOSITORY, TAG
from deltalens.backbones.preprocessing import of_points, record
from deltalens.models.point_transformer import PointTransformer

# name -> what differs from Point-MAE
PUBLISHED: dict[str, dict[str, Any]] = {
    "point-mae": {},
    "point-bert": {"encoder_dim": 256, "head": "mlp"},
    "act": {},
    "recon": {"class_tokens": ("cls", "img", "text"), "two_streams": True},
}


def create(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """(classifier, its full name). options go to `PointTransformer`: num_groups, group_size, num_points, drop_path,
    head, pos_every_block...

    Weights are given as `checkpoint`, the file that the authors published. Without it Point-MAE's are fetched from the
    hub, where the library torch-pointcloud has them: tag "pretrain", or the data set of a fine-tuned model; ValueError
    for the others. num_classes: None for as many as fine-tuned weights have, else 15.
    """
    if name == mini.NAME:
        model = PointTransformer(10 if num_classes is None else num_classes, **{**mini.CONFIG, **options})
        if pretrained or checkpoint is not None:
            load_published(model, checkpoint or str(mini.WEIGHTS))
        full = name
    else:
        model, full = _published(name, num_classes, pretrained, checkpoint, options), f"points/{name}"
    record(model, of_points(model))
    return model.eval(), full


def list_models(pattern: str, pretrained: bool) -> list[str]:
    """Full names whose part after `points/` matches; with `pretrained` those whose weights can be fetched."""
    known = REPOSITORY if pretrained else PUBLISHED
    return [f"points/{name}" for name in known if fnmatch.fnmatch(name, pattern)]


def _published(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> PointTransformer:
    architecture, _, tag = name.partition(".")
    if architecture not in PUBLISHED:
        raise ValueError(f"there is no points/{name}{_nearest(name, PUBLISHED)}")
    if pretrained and checkpoint is None:
        checkpoint = _fetched(architecture, tag)
    model = PointTransformer(15 if num_classes is None else num_classes, **{**PUBLISHED[architecture], **options})
    if checkpoint is not None:
        load_published(model, checkpoint, own_classes=num_classes is None)
    return model


def _fetched(architecture: str, tag: str) -> str:
    """Path of the weights file in the hub's cache, fetched where it is not there."""
    if architecture not in REPOSITORY:
        raise ValueError(
            f"the weights of points/{architecture} cannot be fetched by name: pass the authors' file as checkpoint=, "
            f"or pretrained=False for random weights, or use {mini.NAME}"
        )
    from huggingface_hub import hf_hub_download

    return hf_hub_download(REPOSITORY[architecture].format(tag=tag or TAG), FILE)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4) or sorted(known)
    return f"; did you mean {', '.join(f'points/{each}' for each in near)}?"
