"""A dense task measured on a part of its data: metrics, class by class, confusion, and what it says of examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deltalens.data.dense_items import DenseImages
from deltalens.data.dense_transforms import truth_in_original_pixels
from deltalens.data.oriented_items import OrientedImages
from deltalens.studies.examples import shown_indices
from deltalens.studies.oriented_tiles import Tiles, found_in_tiles, whole_target
from deltalens.tasks import Detection, DetectionTask, InstanceTask, SegmentationTask
from deltalens.tasks.box_confusion import BoxConfusion
from deltalens.training.loaders import evaluation_loader

NOTHING = "nothing"
COUNTS = ("objects", "pixels")
THRESHOLD = 0.3  # least score of what counts in the confusion and is drawn


@dataclass(frozen=True)
class Measured:
    """values: metric -> value, with "loss" where there is one. per_class: class -> column -> value, NaN where the data
    do not have the class. confusion: int64, rows true and columns found, of the names in `confused`; of objects the
    last is "nothing", and `threshold` the least score that counts. task: its name."""

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray
    confused: tuple[str, ...]
    images: int
    threshold: float | None = None
    task: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of what is measured of each class."""
        return list(next(iter(self.per_class.values()), {}))

    @staticmethod
    def text(column: str, value: float) -> str:
        """One value of the table by class."""
        if column in COUNTS:
            return f"{int(value):,}"
        return "-" if math.isnan(value) else f"{value:.4f}"

    def to_dict(self, part: str) -> dict[str, Any]:
        """JSON-able, for results.json; null for NaN."""
        rows = {
            name: {column: None if math.isnan(value) else value for column, value in row.items()}
            for name, row in self.per_class.items()
        }
        confusion = {"classes": list(self.confused), "counts": self.confusion.tolist()}
        confusion |= {} if self.threshold is None else {"threshold": self.threshold}
        return {"per_class": {"part": part, "classes": rows}, "confusion": confusion}


@torch.inference_mode()
def measure(
    task: nn.Module,
    files: DenseImages,
    batch_size: int,
    workers: int,
    device: Any,
    threshold: float = THRESHOLD,
    tiles: Tiles | None = None,
) -> Measured:
    """Everything that is measured of a task, on the device that it is on. files: with the transform of the test.
    threshold: the least score of a detection in the confusion. tiles: look at pictures with oriented boxes tile by
    tile, and measure what is found in the whole pictures."""
    task.eval()
    metrics = task.new_metrics().to(device)  # type: ignore[operator]
    of_boxes = {"overlaps": task.overlaps} if isinstance(task, DetectionTask) else {}
    boxes = BoxConfusion(len(task.class_names), threshold, **of_boxes)  # type: ignore[arg-type]
    loss = 0.0
    for result, batch in _results(task, files, batch_size, workers, device, tiles):
        task.update_metrics(metrics, result, batch)  # type: ignore[operator]
        if result["loss"] is not None:
            loss += float(result["loss"]) * len(batch[0]) / len(files)
        else:
            boxes.update(result["output"], batch[1])
    values = {name: float(value) for name, value in metrics.compute().items()}
    names: list[str] = list(task.class_names)  # type: ignore[arg-type]
    if isinstance(task, SegmentationTask):
        pixels = metrics["pixels"]
        counts = pixels.confusion()
        columns = {"IoU": pixels.iou(), "accuracy": pixels.accuracy(), "pixels": counts.sum(1)}
        return Measured({"loss": loss, **values}, _rows(names, columns), counts.numpy(), tuple(names), len(files))
    rows = _rows(names, task.class_columns(metrics))  # type: ignore[operator]
    return Measured(values, rows, boxes.counts.numpy(), (*names, NOTHING), len(files), threshold, task.name)


def _results(
    task: nn.Module, files: DenseImages, batch_size: int, workers: int, device: Any, tiles: Tiles | None
) -> Iterator[tuple[dict[str, Any], tuple[list, list]]]:
    """(the task's result, the batch) of all batches; with tiles of all pictures."""
    if tiles is None:
        for batch in _batches(files, batch_size, workers, device):
            yield task(batch), batch
        return
    assert isinstance(files, OrientedImages)
    for index in range(len(files)):
        found = found_in_tiles(task, files, index, tiles, batch_size, device)
        yield {"loss": None, "output": [found]}, ([None], [whole_target(files, index, device)])


def _rows(names: Sequence[str], columns: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: {column: float(values[i]) for column, values in columns.items()} for i, name in enumerate(names)}


def _batches(files: DenseImages, batch_size: int, workers: int, device: Any) -> Iterator[tuple[list, list]]:
    for images, truths in evaluation_loader(files, batch_size, workers):
        yield [image.to(device) for image in images], [_moved(truth, device) for truth in truths]


def _moved(truth: Any, device: Any) -> Any:
    if isinstance(truth, Tensor):
        return truth.to(device)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in truth.items()}


# ------------------------------------------------------------------ single pictures
@dataclass(frozen=True)
class Found:
    """What a task says of one picture, in the picture's own pixels: of segmentation mask (H, W) of classes, of objects
    the detections. true: the same of the truth, None where it is not known."""

    name: str
    picture: Image.Image
    mask: np.ndarray | None = None
    detections: tuple[Detection, ...] = ()
    true: Found | None = None


@torch.inference_mode()
def found_in(
    task: nn.Module,
    files: DenseImages,
    batch_size: int,
    device: Any,
    threshold: float = THRESHOLD,
    with_truth: bool = False,
    tiles: Tiles | None = None,
) -> Iterator[Found]:
    """What the task says of each picture, in order. files: with the transform of the test. tiles: as in `measure`."""
    task.eval()
    if tiles is not None:
        yield from _found_by_tiles(task, files, batch_size, device, threshold, with_truth, tiles)
        return
    number = 0
    for images, truths in _batches(files, batch_size, 0, device):
        pictures = [files.image(number + i).convert("RGB") for i in range(len(images))]
        if isinstance(task, SegmentationTask):
            logits = task.segment(images, [picture.size[::-1] for picture in pictures])
            said: list[dict[str, Any]] = [{"mask": each.mask.cpu().numpy()} for each in task.decode(logits)]
        else:
            assert isinstance(task, DetectionTask)
            output = task.model(images)
            moved = [task.in_original(each, truth) for each, truth in zip(output, truths, strict=True)]
            said = [{"detections": tuple(each)} for each in task.decode(moved, threshold)]
        for i, picture in enumerate(pictures):
            name = files.name(number + i)
            true = Found(name, picture, **_truth(task, truths[i])) if with_truth else None
            yield Found(name, picture, **said[i], true=true)
        number += len(images)


def _found_by_tiles(
    task: Any, files: DenseImages, batch_size: int, device: Any, threshold: float, with_truth: bool, tiles: Tiles
) -> Iterator[Found]:
    assert isinstance(files, OrientedImages)
    for index in range(len(files)):
        name, picture = files.name(index), files.image(index).convert("RGB")
        found = found_in_tiles(task, files, index, tiles, batch_size, device)
        true = Found(name, picture, **_truth(task, whole_target(files, index, "cpu"))) if with_truth else None
        yield Found(name, picture, detections=tuple(task.decode([found], threshold)[0]), true=true)


def _truth(task: nn.Module, truth: Any) -> dict[str, Any]:
    """The mask, or the objects of a target as detections with score 1."""
    if not isinstance(task, DetectionTask):
        return {"mask": truth.cpu().numpy()}
    own = truth_in_original_pixels(truth)
    found = {name: own[name].as_subclass(Tensor) for name in ("boxes", "labels")}
    found["scores"] = torch.ones(len(found["labels"]), device=found["labels"].device)
    if isinstance(task, InstanceTask):
        found["masks"] = own["masks"].as_subclass(Tensor)[:, None].float()
    return {"detections": tuple(task.decode([found], 0.0)[0])}


def examples_of(
    task: nn.Module,
    files: DenseImages,
    count: int = 6,
    device: Any = "cpu",
    threshold: float = THRESHOLD,
    tiles: Tiles | None = None,
) -> list[Found]:
    """What the task says of a few pictures, evenly spaced, with the truth."""
    chosen = files.subset(shown_indices(len(files), count))
    return list(found_in(task, chosen, 1, device, threshold, with_truth=True, tiles=tiles))
