"""What Mona costs in dense prediction: on Swin under RetinaNet and under UPerNet, beside its published form and full
fine-tuning. And what IoU and NMS of oriented boxes cost (`oriented_bench.py`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import deltalens as dl
from deltalens.studies.backbone_steps import BackboneStep, backbone_timings
from deltalens.studies.bench_report import Report, Row, Section, Target
from deltalens.studies.benchmarks import FULL, Options, check_same_outputs, full
from deltalens.studies.measure import Timings, interleaved, peak_bytes, saved_bytes
from deltalens.studies.oriented_bench import bench_oriented
from deltalens.studies.plain_forms import plain_mona
from deltalens.tasks.detection import DetectionTask
from deltalens.tasks.segmentation import SegmentationTask

MODELS = ("timm/swin_tiny_patch4_window7_224", "timm/swin_base_patch4_window7_224")
QUICK_MODEL = "deltalens/swin-mini"
SIZE, QUICK_SIZE = 512, 64  # edge of the images in pixels
HEADS = {"retinanet": 20, "upernet": 150}  # head -> classes: of VOC, of ADE20K
OF_BOXES = "oriented"  # asks for the part without a network
QUICK_CHANNELS = {"retinanet": {"channels": 32}, "upernet": {"channels": 32, "auxiliary_channels": 32}}
BATCH = 2  # UPerNet norms over the images of a batch, and takes no single one in training
OBJECTS = 5  # in an image
PLAIN, OURS, LOW = "plain", "deltalens", 'deltalens memory="low"'
SAVED_LIMIT, STEP_LIMIT = 0.72, 0.85  # low: saved by the backbone / full; normal: step / plain form
NOTE = "all train the same head; 'backbone alone' is the part of the step in the backbone, and what its forward saves"


def bench_dense(options: Options) -> Report:
    """Training steps of Mona and of full fine-tuning, random weights and images, dropout of Mona and drop path 0.

    The contenders take turns on one batch. Each step is timed whole, and its part in the backbone by itself
    (`BackboneStep`); neck, decoder and losses are the same modules for all of them and are trained by all. Oriented
    boxes come after them, unless one head is asked for; or alone, where that "head" is "oriented".
    """
    options = options.settled(" and ".join(MODELS), QUICK_MODEL, BATCH)
    size = options.img_size or (QUICK_SIZE if options.quick else SIZE)
    models = MODELS if options.model == " and ".join(MODELS) else (options.model,)
    batch_size = options.batch_size or BATCH
    heads = [head for head in HEADS if options.head in (None, head)]
    if "upernet" in heads and batch_size < 2:
        raise ValueError(
            "UPerNet needs at least 2 images a batch in training: give --batch-size 2, or --head retinanet"
        )
    sections: list[Section] = []
    targets: list[Target] = []
    for model, head in itertools.product(models, heads):
        whole, alone = _compare(options, str(model), head, batch_size, size)
        sections += [whole, alone]
        if model in MODELS and size == SIZE:
            targets += _targets(whole, alone, f"{_short(model)}, {head}")
    if options.head in (None, OF_BOXES):
        of_boxes, promised = bench_oriented(options)
        sections += of_boxes
        targets += promised
    return Report("Dense prediction", options.describe(size), sections, targets, [NOTE])


def _compare(options: Options, model: str, head: str, batch_size: int, size: int) -> tuple[Section, Section]:
    """The tables of whole steps and of the backbone alone."""
    torch.manual_seed(0)
    classes = HEADS[head]
    head_options = QUICK_CHANNELS[head] if options.quick else {}
    network = dl.create_backbone(
        model,
        num_classes=classes,
        head=head,
        head_options=head_options,
        pretrained=False,
        img_size=size,
        drop_path_rate=0.0,
    ).to(options.device)
    ours = dl.attach(copy.deepcopy(network), dl.MonaConfig(dropout=0.0))
    low = copy.deepcopy(ours)
    for module in low.modules():
        if isinstance(module, dl.MonaLayer):
            module.memory = "low"
    networks = {FULL: full(network), PLAIN: plain_mona(ours), OURS: ours, LOW: low}
    images, truth = _batch(head, batch_size, size, options.device)
    check_same_outputs(images, {name: _Maps(networks[name]) for name in (PLAIN, OURS, LOW)})
    kind = DetectionTask if head == "retinanet" else SegmentationTask
    tasks = {name: kind(each, [str(i) for i in range(classes)]).train() for name, each in networks.items()}
    batch = (list(images), truth) if head == "retinanet" else (images, truth)
    steps = {
        name: BackboneStep(
            task.model, str(networks[name].adapted), _loss_of(task, batch), options.device, options.clock
        )
        for name, task in tasks.items()
    }

    def drop_gradients() -> None:
        for task in tasks.values():
            task.zero_grad(set_to_none=True)

    saved = {name: step.saved_bytes() for name, step in steps.items()}
    saved_whole = {name: saved_bytes(_loss_of(task, batch), _own(task)) for name, task in tasks.items()}
    timings = interleaved(steps, options.rounds, between=drop_gradients, device=options.device, clock=options.clock)
    alone = backbone_timings(steps, options.rounds)
    peaks = {}
    for name, step in steps.items():
        peaks[name] = peak_bytes(step, options.device)
        drop_gradients()
    title = f"{_short(model)} under {head}"
    return (
        Section(f"{title}, whole step", _rows(timings, saved_whole, peaks), ("full", FULL)),
        Section(f"{title}, backbone alone", _rows(alone, saved, {}), ("full", FULL)),
    )


def _batch(head: str, batch_size: int, size: int, device: str) -> tuple[Tensor, Any]:
    """Random images (B, 3, S, S), and boxes or masks."""
    classes = HEADS[head]
    images = torch.randn(batch_size, 3, size, size, device=device)
    if head == "upernet":
        return images, torch.randint(classes, (batch_size, size, size), device=device)
    targets = []
    for _ in range(batch_size):
        corner = torch.rand(OBJECTS, 2) * size / 2
        boxes = torch.cat([corner, corner + size * (0.1 + 0.4 * torch.rand(OBJECTS, 2))], 1)
        targets.append({"boxes": boxes.to(device), "labels": torch.randint(classes, (OBJECTS,)).to(device)})
    return images, targets


class _Maps(nn.Module):
    """All maps of a dense network's backbone in one row for each image."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.backbone = network.get_submodule(str(network.adapted))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([each.flatten(1) for each in self.backbone(images)], 1)


def _loss_of(task: nn.Module, batch: Any) -> Callable[[], Tensor]:
    return lambda: task(batch)["loss"]


def _own(task: nn.Module) -> list[Tensor]:
    return [*task.parameters(), *task.buffers()]


def _rows(timings: Timings, saved: Mapping[str, int], peaks: Mapping[str, int | None]) -> list[Row]:
    rows = []
    for name in timings.seconds:
        references = {"full": FULL} | ({"plain": PLAIN} if name in (OURS, LOW) else {})
        ratios = {label: timings.ratio(name, reference) for label, reference in references.items()}
        rows.append(Row(name, timings.median(name), ratios, saved[name], peaks.get(name)))
    return rows


def _targets(whole: Section, alone: Section, title: str) -> list[Target]:
    return [
        Target(f'{title}: saved by the backbone, memory="low" / full', alone.saved_ratio(LOW, FULL), SAVED_LIMIT),
        Target(f"{title}: training step / plain form", whole.row(OURS).ratios["plain"], STEP_LIMIT),
        Target(f"{title}: its part in the backbone / plain form's", alone.row(OURS).ratios["plain"], STEP_LIMIT),
    ]


def _short(model: str) -> str:
    return model.rsplit("/", 1)[-1].split("_patch")[0]
