"""Multi-label classification: any number of labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.sites.output import logits_of
from deltalens.tasks.classification import ClassificationTask

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class MultiLabelTask(ClassificationTask):
    """A classifier of images with several labels: one independent yes or no for each class.

        task = MultiLabelTask(model, class_names)
        for batch in loader:                       # (images (B, C, H, W), labels (B, classes) of 1, 0 and -1)
            loss = task(batch)["loss"]

    The loss is the binary cross-entropy, averaged over the entries that are not -1; a label -1 (not known, or
    "difficult" in VOC) counts neither in the loss nor in the metrics. label_smoothing s turns 0 and 1 into s/2 and
    1 - s/2. In training mode the loss terms of the model's active adapters are added, as in `ClassificationTask`, which
    says what is refused.
    """

    name = "multilabel"
    main_metric = "mAP"

    def __init__(self, model: nn.Module, class_names: Sequence[str], label_smoothing: float = 0.0):
        super().__init__(model, class_names, label_smoothing)

    def own_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"binary_cross_entropy": mean over the known entries}, 0 where none is known."""
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}: 1, 0 or -1 for each class"
            )
        known = labels >= 0
        wanted = labels.clamp(min=0).to(logits.dtype)
        wanted = wanted * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return {"binary_cross_entropy": (each * known).sum() / known.sum().clamp(min=1)}

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics: "mAP" (mean over classes of the average precision) and "mAP_voc07" (its 11-point form)."""
        from torchmetrics import MetricCollection

        from deltalens.tasks.average_precision import AveragePrecision

        return MetricCollection({"average_precision": AveragePrecision()}, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, result: dict[str, Any], batch: Sequence[Tensor]) -> None:
        """Add one batch's result to metrics made by `new_metrics`."""
        metrics.update(result["output"], batch[1])

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> average precision; NaN for a class that no image has."""
        return dict(zip(self.class_names, metrics["average_precision"].per_class().tolist(), strict=True))

    def decode(self, output: Any, topk: int | None = None, threshold: float = 0.5) -> list[list[tuple[str, float]]]:
        """Logits (B, classes) -> for each image the (class name, probability) with a probability of at least
        `threshold`, best first; at most `topk` of them."""
        probabilities, indices = torch.sigmoid(logits_of(output).float()).sort(1, descending=True)
        return [
            [(self.class_names[i], p) for i, p in zip(row, values, strict=True) if p >= threshold][:topk]
            for row, values in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
