"""Instance segmentation: boxes with classes, scores and a mask each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltalens.tasks.detection import DetectionTask

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class InstanceTask(DetectionTask):
    """`DetectionTask` with masks: targets have "masks" (n, H, W) of 0 and 1 beside boxes and labels.

        task = InstanceTask(model, class_names)
        for images, targets in loader:
            loss = task.train()((images, targets))["loss"]

    Metrics are those of boxes, and COCO's of masks as "mask_map", "mask_map50", "mask_map75", "mask_map_small" and so
    on, of which "mask_map" is the main one. A mask is where its probability is above 0.5.

    Raises ValueError as `DetectionTask`, and in training for targets whose masks are missing or of another number.
    """

    name = "instance"
    main_metric = "mask_map"
    main_metrics = {**DetectionTask.main_metrics, "coco": "mask_map"}
    fields = ("boxes", "labels", "masks")

    def _usable(self, target: Mapping[str, Any]) -> dict[str, Tensor]:
        masks = target.get("masks")
        if masks is None or len(masks) != len(target["labels"]):
            found = "none" if masks is None else f"{len(masks)} for {len(target['labels'])} objects"
            raise ValueError(f"instances need a mask for each object; image {target.get('image_id')} has {found}")
        return super()._usable(target)

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics: those of `DetectionTask`, and COCO's of masks."""
        from torchmetrics import MetricCollection

        from deltalens.tasks.box_metrics import CocoAveragePrecision, VocAveragePrecision

        classes = len(self.class_names)
        metrics = {"coco": CocoAveragePrecision(classes, masks=True), "voc": VocAveragePrecision(classes)}
        return MetricCollection(metrics, compute_groups=False)

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> average precision of masks, or as the main metric has it; NaN for a class that no image
        has."""
        if self.metrics != "coco":
            return super().per_class(metrics)
        return dict(zip(self.class_names, metrics["coco"].per_class(masks=True), strict=True))

    def class_columns(self, metrics: MetricCollection) -> dict[str, Any]:
        """Column -> values of all classes: the tables of reports."""
        boxes = super().class_columns(metrics)
        masks = {"mask AP": metrics["coco"].per_class(masks=True)}
        return masks | {f"box {name}" if name.startswith("AP") else name: values for name, values in boxes.items()}

    def _masks(self, found: Mapping[str, Tensor], order: Tensor) -> Sequence[Tensor]:
        from deltalens.tasks.box_metrics import MASK_THRESHOLD

        return list((found["masks"][:, 0] > MASK_THRESHOLD)[order])
