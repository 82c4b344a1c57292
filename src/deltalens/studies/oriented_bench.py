"""What oriented boxes cost: IoU and NMS beside torchvision's of upright boxes, spread over an image and in a crowd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import oriented_iou
from deltalens.models.oriented_nms import oriented_nms
from deltalens.studies.bench_report import Row, Section, Target
from deltalens.studies.benchmarks import Options
from deltalens.studies.measure import interleaved

BOXES, TRUE_BOXES = 2000, 200
QUICK_BOXES, QUICK_TRUE_BOXES = 100, 20
SIDES = (5.0, 60.0)  # pixels
EXTENTS = {"spread": 1000.0, "crowded": 50.0}  # edge of the square of the centres; in the crowd nearly all overlap
THRESHOLDS = (0.1, 0.5)  # of NMS: mmrotate's for DOTA, and torchvision's usual one
LIMIT = 20.0  # of oriented boxes / upright ones
UPRIGHT, ORIENTED = "upright, torchvision", "oriented"
Run = Callable[[], Tensor]


def bench_oriented(options: Options) -> tuple[list[Section], list[Target]]:
    """Tables of both kinds of scenes, and the promise for boxes spread over an image.

    Upright boxes are those around the oriented ones. NMS of a crowd is no promise: torchvision's loop over upright
    boxes ends after as many rounds as boxes are kept, in a tenth of a millisecond where few are.
    """
    count, true_count = (QUICK_BOXES, QUICK_TRUE_BOXES) if options.quick else (BOXES, TRUE_BOXES)
    sections, targets = [], []
    for scene, extent in EXTENTS.items():
        made = torch.Generator().manual_seed(0)
        boxes, truth = (_boxes(n, extent, made).to(options.device) for n in (count, true_count))
        scores = torch.rand(count, generator=made).to(options.device)
        for name, upright, oriented in _pairs(boxes, truth, scores):
            runs = {UPRIGHT: upright, ORIENTED: oriented}
            timings = interleaved(runs, options.rounds, device=options.device, clock=options.clock)
            ratio = timings.ratio(ORIENTED, UPRIGHT)
            rows = [Row(UPRIGHT, timings.median(UPRIGHT)), Row(ORIENTED, timings.median(ORIENTED), {"upright": ratio})]
            sections.append(Section(f"{name}, {scene}", rows))
            if not options.quick and (scene == "spread" or name.startswith("IoU")):
                targets.append(Target(f"{name}, {scene}: oriented / upright boxes", ratio, LIMIT))
    return sections, targets


def _pairs(boxes: Tensor, truth: Tensor, scores: Tensor) -> Iterator[tuple[str, Run, Run]]:
    """What is measured: name, on upright boxes, on oriented ones."""
    upright, upright_truth = enclosing(boxes), enclosing(truth)
    name = f"IoU {len(boxes)} x {len(truth)}"
    yield name, partial(box_iou, upright, upright_truth), partial(oriented_iou, boxes, truth)
    for threshold in THRESHOLDS:
        name = f"NMS of {len(boxes)} at {threshold}"
        yield name, partial(nms, upright, scores, threshold), partial(oriented_nms, boxes, scores, threshold)


def _boxes(count: int, extent: float, made: torch.Generator) -> Tensor:
    """(count, 5): centres in a square, any angle."""
    share = torch.rand(count, 5, generator=made)
    low = torch.tensor([0.0, 0.0, SIDES[0], SIDES[0], -torch.pi / 2])
    high = torch.tensor([extent, extent, SIDES[1], SIDES[1], torch.pi / 2])
    return low + (high - low) * share
