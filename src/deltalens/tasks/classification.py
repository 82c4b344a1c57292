"""Image classification: one label per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.notes import noting
from deltalens.sites.output import class_count, logits_of
from deltalens.tasks.method_losses import method_losses

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class ClassificationTask(nn.Module):
    """A classifier with its loss, metrics and decoding; works in any training loop.

        task = ClassificationTask(model, class_names)
        for batch in loader:                       # (images (B, C, H, W), labels (B,) integers)
            loss = task(batch)["loss"]

    Where a method has a gradient rule (ProGrad), `deltalens.tasks.backward(task, task(batch))` is its backward.

    The loss is cross-entropy with `label_smoothing`, plus, in training mode, the loss terms of the model's active
    adapters (`Method.losses`). task.train() goes through the model's own train(), which holds frozen modules in eval
    mode.

    Raises ValueError where the model has another number of outputs than there are class names, and, in forward, for
    labels beyond the outputs.
    """

    name = "classification"
    main_metric = "accuracy"  # what choices are made by

    def __init__(self, model: nn.Module, class_names: Sequence[str], label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        outputs = class_count(model)
        if outputs not in (None, len(class_names)):
            raise ValueError(
                f"the model has {outputs} outputs and the data {len(class_names)} classes; pass "
                f"num_classes={len(class_names)} to attach or create_backbone"
            )
        self.model = model
        self.class_names = list(class_names)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Sequence[Tensor]) -> dict[str, Any]:
        """(images, labels) -> {"loss": scalar, "output": logits (B, classes), "losses": the loss's terms, detached,
        "terms": the same with their graph}."""
        images, labels = batch
        with noting():
            output = logits_of(self.model(images))
            self._check_output(output, images)
            logits = output.float()
            terms = self.own_losses(logits, labels)
            if self.training:
                terms |= method_losses(self.model, logits, batch)
        return {
            "loss": sum(terms.values()),
            "output": logits,
            "losses": {name: term.detach() for name, term in terms.items()},
            "terms": terms,
        }

    def _check_output(self, output: Tensor, images: Tensor) -> None:
        if output.dim() != 2 or output.shape[1] != len(self.class_names):
            raise ValueError(
                f"the model's output has shape {tuple(output.shape)}, expected "
                f"({len(images)}, {len(self.class_names)}): one logit for each class"
            )

    def own_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss without the methods' terms."""
        return {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics: "accuracy" (top-1), "mean_class_accuracy", and "top5_accuracy" where there are more than 5
        classes."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        classes = len(self.class_names)
        metrics = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "mean_class_accuracy": MulticlassAccuracy(classes, average="macro"),
        }
        if classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        return MetricCollection(metrics, compute_groups=False)  # groups form where a first batch happens to agree

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> what the task measures of each class; nothing here."""
        return {}

    def update_metrics(self, metrics: MetricCollection, result: dict[str, Any], batch: Sequence[Tensor]) -> None:
        """Add one batch's result to metrics made by `new_metrics`."""
        metrics.update(result["output"], batch[1])

    def decode(self, output: Any, topk: int = 1) -> list[list[tuple[str, float]]]:
        """Logits (B, classes) -> for each image the `topk` most probable (class name, probability), best first."""
        probabilities, indices = torch.softmax(logits_of(output).float(), 1).topk(min(topk, len(self.class_names)), 1)
        return [
            [(self.class_names[i], p) for i, p in zip(row, values, strict=True)]
            for row, values in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
