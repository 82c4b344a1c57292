"""What making patches of point clouds costs beside a training step of the transformer that reads them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import deltalens as dl
from deltalens.models.point_ops import farthest_points, nearest_points, take_points
from deltalens.models.point_transformer import PointTransformer
from deltalens.studies.bench_report import Report, Row, Section, Target
from deltalens.studies.benchmarks import FULL, Options
from deltalens.studies.measure import interleaved

MODEL, QUICK_MODEL = "points/point-mae", "deltalens/points-mini"
BATCH, POINTS = 32, 2048
SHARE_LIMIT = 0.15  # of a training step
ADAPTED = "AdaptFormer"


def bench_points(options: Options) -> Report:
    """Farthest points, neighbours and both together ("patches") of a batch of clouds, beside whole training steps:
    full fine-tuning, and AdaptFormer on the frozen network. Random clouds and weights; drop path 0."""
    if options.img_size is not None:
        raise ValueError("the part points takes clouds: leave out --img-size")
    options = options.settled(MODEL, QUICK_MODEL, BATCH)
    torch.manual_seed(0)
    model = dl.create_backbone(options.model, pretrained=False, num_classes=15)
    if not isinstance(model, PointTransformer):
        raise ValueError(f"the part points takes a model of point clouds, such as {MODEL}, and not {options.model}")
    model = model.to(options.device)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    points = POINTS if options.model == MODEL else model.num_points
    clouds = torch.randn(options.batch_size, points, 3, device=options.device)
    labels = torch.randint(15, (options.batch_size,), device=options.device)
    adapted = dl.attach(copy.deepcopy(model), dl.AdaptFormerConfig())
    centres = take_points(clouds, farthest_points(clouds, model.num_groups))
    timings = interleaved(
        {
            FULL: lambda: _step(model, clouds, labels),
            ADAPTED: lambda: _step(adapted, clouds, labels),
            "patches": lambda: model.group(clouds),
            "farthest points": lambda: farthest_points(clouds, model.num_groups),
            "neighbours": lambda: nearest_points(clouds, centres, model.group_size),
        },
        options.rounds,
        between=lambda: _drop_gradients(model, adapted),
        device=options.device,
        clock=options.clock,
    )
    references = {"full": FULL, "AdaptFormer": ADAPTED}
    rows = [
        Row(name, timings.median(name), {label: timings.ratio(name, other) for label, other in references.items()})
        for name in timings.seconds
    ]
    section = Section("training step and its patches", rows)
    targets = []
    if (options.model, options.batch_size) == (MODEL, BATCH):
        share = section.row("patches").ratios["full"]
        targets = [Target(f"points: patches of {BATCH} clouds / training step", share, SHARE_LIMIT)]
    settings = options.describe(0) | {"points": points, "patches": model.num_groups}
    del settings["image size"]
    return Report("Point clouds", settings, [section], targets)


def _step(model: nn.Module, clouds: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model.train()(clouds), labels).backward()


def _drop_gradients(*models: nn.Module) -> None:
    for model in models:
        model.zero_grad(set_to_none=True)
