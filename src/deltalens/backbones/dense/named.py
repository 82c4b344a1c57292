"""Networks for dense prediction by the name of their backbone and of their head."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from deltalens.backbones.dense import body as bodies
from deltalens.backbones.preprocessing import preprocessing_of, record

HEADS = {
    "upernet": "deltalens.backbones.dense.upernet:build",
    "fcn": "deltalens.backbones.dense.fcn:build",
    "dpt": "deltalens.backbones.dense.dpt:build",
    "setr_pup": "deltalens.backbones.dense.setr_pup:build",
    "retinanet": "deltalens.backbones.dense.retinanet:build",
    "fcos": "deltalens.backbones.dense.fcos:build",
    "cascade_rcnn": "deltalens.backbones.dense.cascade_rcnn:build_boxes",
    "mask_rcnn": "deltalens.backbones.dense.mask_rcnn:build",
    "cascade": "deltalens.backbones.dense.cascade_rcnn:build",
    "oriented_rcnn": "deltalens.backbones.dense.oriented_rcnn:build",
    "oriented_retinanet": "deltalens.backbones.dense.oriented_retinanet:build",
    "h2rbox_v2": "deltalens.backbones.dense.h2rbox_v2:build",
}
"""Head -> a function (body, num_classes, **options) -> the network, which says where its backbone is (`adapted`)."""


def create(
    name: str,
    head: str,
    head_options: Mapping[str, Any] | None,
    num_classes: int | None,
    pretrained: bool,
    checkpoint: str | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, str]:
    """(network, its backbone's full name) of a timm model's name and a head's. checkpoint: the backbone's weights, or
    those of a whole Cascade (Mask) R-CNN of mmdetection (`mmdetection.load`).

    Raises ValueError for an unknown head, options that the head does not have, or no number of classes; TypeError for a
    backbone that gives no maps, or not those that the head needs; ImportError where the head's library is missing.
    """
    build = head_builder(head)
    head_options = checked_options(head, build, head_options)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f"head={head!r} needs num_classes, the number of classes without background, got {num_classes}"
        )
    if "features_only" in options or "out_indices" in options:
        raise ValueError("features_only and out_indices are chosen by the head: leave them out")
    whole = None
    if checkpoint is not None:
        from deltalens.backbones.dense import mmdetection

        whole = mmdetection.whole_network(checkpoint)
    of_backbone = (pretrained, checkpoint) if whole is None else (False, None)
    body, full_name = bodies.build(name, *of_backbone, options)
    network = build(body, num_classes, **head_options)
    if whole is not None:
        mmdetection.load(network, whole, str(checkpoint))
    record(network, {**preprocessing_of(body.module), "input_size": [3, *body.image_size]})
    return network, full_name


def head_builder(head: str) -> Callable[..., nn.Module]:
    """The function that builds a network with this head; ValueError for an unknown one."""
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; the dense heads are {', '.join(HEADS)}")
    module, _, function = HEADS[head].partition(":")
    return getattr(importlib.import_module(module), function)


def checked_options(
    head: str, build: Callable[..., nn.Module], head_options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The head's options as a dictionary; ValueError for those that it does not have. A builder with **options checks
    them itself."""
    found = dict(head_options or {})
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return found
    known = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"head {head!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return found
