"""Detection of oriented boxes: rectangles that lie as their objects lie, as in pictures from above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from deltalens.tasks.detection import Detection, DetectionTask

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class OrientedTask(DetectionTask):
    """`DetectionTask` of oriented boxes: targets have "boxes" (n, 5), (cx, cy, w, h, angle) in pixels and radians, of
    the convention le90: w >= h, angle in [-pi/2, pi/2), turning the x axis (right) towards the y axis (down).

        task = OrientedTask(model, class_names)
        for images, targets in loader:
            loss = task.train()((images, targets))["loss"]

    metrics: which one is `main_metric`: "voc07" (DOTA's AP at IoU 0.5 over eleven recalls; the default), "voc" (area
    under that curve) or "coco" (mean of the areas over IoU 0.5 to 0.95). All are measured
    (`OrientedAveragePrecision`).

    `decode` gives each `Detection` the oriented box and the upright box around it.

    Raises ValueError as `DetectionTask`, and in training for boxes of other than five numbers, boxes that are not
    finite, and boxes without an area.
    """

    name = "oriented"
    default_metrics: ClassVar[str] = "voc07"
    main_metric = "map50_voc07"

    def _check(self, boxes: Tensor, labels: Tensor, image: Any) -> None:
        where = "" if image is None else f" in image {image}"
        if boxes.shape[-1] != 5:
            raise ValueError(
                f"the boxes{where} have {boxes.shape[-1]} numbers each: oriented boxes are (cx, cy, w, h, angle); "
                "upright ones are for DetectionTask"
            )
        wrong = ~(boxes.isfinite().all(1) & (boxes[:, 2:4] > 0).all(1))
        if bool(wrong.any()):
            raise ValueError(
                f"the box {boxes[wrong][0].tolist()}{where} has no area or is not finite: boxes are (cx, cy, w, h, "
                "angle) in pixels and radians"
            )
        self._check_labels(labels, where)

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics: "map50_voc07", "map50_voc", "map75", "map" (`OrientedAveragePrecision`)."""
        from torchmetrics import MetricCollection

        from deltalens.tasks.oriented_metrics import OrientedAveragePrecision

        return MetricCollection({"oriented": OrientedAveragePrecision(len(self.class_names))}, compute_groups=False)

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> average precision as the main metric has it; NaN for a class that no image has."""
        found = metrics["oriented"]
        values = found.average_precisions().mean(0) if self.metrics == "coco" else None
        own = found.per_class(self.metrics == "voc07") if values is None else values.tolist()
        return dict(zip(self.class_names, own, strict=True))

    def class_columns(self, metrics: MetricCollection) -> dict[str, Any]:
        """Column -> values of all classes: the tables of reports."""
        found = metrics["oriented"]
        area = found.average_precisions()
        return {
            "AP50, VOC 2007": found.per_class(True),
            "AP50": area[0],
            "AP75": area[5],
            "objects": found.objects,
        }

    def overlaps(self, found: Tensor, boxes: Tensor) -> Tensor:
        """IoUs (n, m) of boxes found (n, 5) and true (m, 5)."""
        from deltalens.tasks.oriented_metrics import overlaps

        return overlaps(found, boxes)

    def in_original(self, found: dict[str, Tensor], target: dict[str, Any]) -> dict[str, Tensor]:
        """What was found in a transformed picture, in pixels of the picture as it was read."""
        from deltalens.data.oriented_transforms import oriented_in_original_pixels

        return oriented_in_original_pixels(found, target)

    def _decoded(self, found: Mapping[str, Tensor], threshold: float, topk: int | None) -> list[Detection]:
        from deltalens.models.oriented_boxes import enclosing

        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= threshold][:topk]
        boxes = found["boxes"][order]
        rows = (found["labels"][order], found["scores"][order], boxes, enclosing(boxes))
        return [
            Detection(self.class_names[label], score, tuple(upright), None, tuple(box))
            for label, score, box, upright in zip(*(row.tolist() for row in rows), strict=True)
        ]
