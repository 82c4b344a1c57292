"""Object detection: boxes with classes and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.notes import noting
from deltalens.sites.output import class_count
from deltalens.tasks.method_losses import method_losses

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Detection:
    """What was found: the class, its score, the box (left, top, right, bottom) in pixels, of instances the mask (H, W)
    bool, and of oriented boxes (cx, cy, w, h, angle) in pixels and radians, le90, around which `box` then lies."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None
    oriented: tuple[float, float, float, float, float] | None = None


class DetectionTask(nn.Module):
    """A detector with its losses, metrics and decoding; works in any training loop.

        task = DetectionTask(model, class_names)
        for images, targets in loader:             # lists: (3, H, W) each; {"boxes" (n, 4) xyxy pixels, "labels" (n,)}
            loss = task.train()((images, targets))["loss"]

    The loss is the sum of the model's own losses and, in training, of the loss terms of the active adapters' methods.
    In eval mode the model detects, and there is no loss. Labels are indices into class_names, without a background.
    Targets may have "iscrowd", "difficult" (n,) and "area" (n,). The metrics pass over crowds and difficult objects.
    Crowds are never trained on; difficult objects are where the data give them (the readers' training transforms leave
    them out, as mmdetection does for VOC) and train_difficult is not False. An image may have no object, and a batch
    none at all.

    metrics: which one is `main_metric`: "coco" (AP over IoU 0.5 to 0.95; the default), "voc07" (AP at IoU 0.5 over
    eleven recalls) or "voc" (area under that curve). All are measured.

    Raises ValueError where the model has another number of classes than there are names; in training for labels that
    name no class and for boxes without an area.
    """

    name = "detection"
    default_metrics: ClassVar[str] = "coco"
    main_metric = "map"  # what choices are made by
    main_metrics = {"coco": "map", "voc07": "map50_voc07", "voc": "map50_voc"}  # the same, by what data are measured by
    fields: tuple[str, ...] = ("boxes", "labels")
    has_evaluation_loss = False

    def __init__(
        self, model: nn.Module, class_names: Sequence[str], metrics: str | None = None, train_difficult: bool = True
    ):
        super().__init__()
        metrics = metrics or self.default_metrics
        if metrics not in self.main_metrics:
            raise ValueError(f"metrics must be one of {', '.join(self.main_metrics)}, got {metrics!r}")
        classes = class_count(model)
        if classes not in (None, len(class_names)):
            raise ValueError(
                f"the model detects {classes} classes and the data have {len(class_names)}; pass "
                f"num_classes={len(class_names)} to create_backbone (the background is no class)"
            )
        self.model = model
        self.class_names = list(class_names)
        self.metrics, self.main_metric = metrics, self.main_metrics[metrics]
        self.train_difficult = train_difficult

    def forward(self, batch: Sequence[Any]) -> dict[str, Any]:
        """(images, targets) -> in training {"loss": scalar, "output": None, "losses": the loss's terms, detached,
        "terms": the same with their graph}; in eval mode {"loss": None, "output": what was found in each image, as the
        model gives it, "losses": {}, "terms": {}}."""
        images, targets = batch
        images = list(images)
        if not self.training:
            return {"loss": None, "output": self.model(images), "losses": {}, "terms": {}}
        with noting():
            terms = dict(self.model(images, [self._usable(target) for target in targets]))
            terms |= method_losses(self.model, None, batch)
        return {
            "loss": sum(terms.values()),
            "output": None,
            "losses": {name: term.detach() for name, term in terms.items()},
            "terms": terms,
        }

    def _usable(self, target: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the model is trained with."""
        labels, boxes = target["labels"], target["boxes"]
        kept = torch.ones_like(labels, dtype=torch.bool)
        if "iscrowd" in target:
            kept &= ~target["iscrowd"].bool()
        if "difficult" in target and not self.train_difficult:
            kept &= ~target["difficult"].bool()
        if len(labels):
            self._check(boxes, labels, target.get("image_id"))
        return {name: target[name].as_subclass(Tensor)[kept] for name in self.fields}

    def _check(self, boxes: Tensor, labels: Tensor, image: Any) -> None:
        where = "" if image is None else f" in image {image}"
        self._check_labels(labels, where)
        if boxes.shape[-1] != 4:
            raise ValueError(
                f"the boxes{where} have {boxes.shape[-1]} numbers each: here they are (left, top, right, bottom); "
                "oriented ones are for OrientedTask"
            )
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if bool(flat.any()):
            raise ValueError(
                f"the box {boxes[flat][0].tolist()}{where} has no area: boxes are (left, top, right, bottom) in pixels"
            )

    def _check_labels(self, labels: Tensor, where: str) -> None:
        unknown = (labels < 0) | (labels >= len(self.class_names))
        if bool(unknown.any()):
            raise ValueError(
                f"label {int(labels[unknown][0])}{where} names no class: there are {len(self.class_names)}, counted "
                "from 0"
            )

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics of boxes: "map", "map50", "map75", "map_small", "map_medium", "map_large"
        (`CocoAveragePrecision`), "map50_voc07", "map50_voc" (`VocAveragePrecision`)."""
        from torchmetrics import MetricCollection

        from deltalens.tasks.box_metrics import CocoAveragePrecision, VocAveragePrecision

        classes = len(self.class_names)
        metrics = {"coco": CocoAveragePrecision(classes), "voc": VocAveragePrecision(classes)}
        return MetricCollection(metrics, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, result: dict[str, Any], batch: Sequence[Any]) -> None:
        """Add one batch's result to metrics made by `new_metrics`: in pixels of the pictures as they were read, where
        the targets say how they were resized. Image by image, since a hundred resized masks take much memory."""
        from deltalens.data.dense_transforms import truth_in_original_pixels

        for each, target in zip(result["output"], batch[1], strict=True):
            found = self.in_original(each, target) if "orig_size" in target else each
            metrics.update([found], [truth_in_original_pixels(target)])

    def in_original(self, found: dict[str, Tensor], target: dict[str, Any]) -> dict[str, Tensor]:
        """What was found in a transformed picture, in pixels of the picture as it was read."""
        from deltalens.data.dense_transforms import in_original_pixels

        return in_original_pixels(found, target)

    def overlaps(self, found: Tensor, boxes: Tensor) -> Tensor:
        """IoUs (n, m) of boxes found (n, 4) and true (m, 4)."""
        from torchvision.ops import box_iou

        return box_iou(found, boxes)

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> average precision as the main metric has it; NaN for a class that no image has."""
        if self.metrics == "coco":
            values = metrics["coco"].per_class()
        else:
            values = metrics["voc"].per_class(self.metrics == "voc07")
        return dict(zip(self.class_names, values, strict=True))

    def class_columns(self, metrics: MetricCollection) -> dict[str, Any]:
        """Column -> values of all classes: the tables of reports."""
        coco, voc = metrics["coco"], metrics["voc"]
        return {"AP": coco.per_class(), "AP50": voc.per_class(False), "objects": voc.objects}

    def decode(
        self, output: Sequence[Mapping[str, Tensor]], threshold: float = 0.5, topk: int | None = None
    ) -> list[list[Detection]]:
        """What the model found -> for each image the detections with a score of at least `threshold`, best first; at
        most `topk` of them."""
        return [self._decoded(found, threshold, topk) for found in output]

    def _decoded(self, found: Mapping[str, Tensor], threshold: float, topk: int | None) -> list[Detection]:
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= threshold][:topk]
        rows = zip(
            found["labels"][order].tolist(),
            found["scores"][order].tolist(),
            found["boxes"][order].tolist(),
            self._masks(found, order),
            strict=True,
        )
        return [Detection(self.class_names[label], score, tuple(box), mask) for label, score, box, mask in rows]

    def _masks(self, found: Mapping[str, Tensor], order: Tensor) -> Sequence[Tensor | None]:
        return [None] * len(order)
