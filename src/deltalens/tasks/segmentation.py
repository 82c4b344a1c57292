"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.notes import noting
from deltalens.sites.output import class_count
from deltalens.tasks.method_losses import method_losses
from deltalens.tasks.segmentation_inference import Inference, resized, segment

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

IGNORED = 255


@dataclass(frozen=True)
class Segmented:
    """What was found in an image: mask (H, W) int64 of classes from 0; shares: (class name, share of the pixels) of the
    classes that are there, largest first."""

    mask: Tensor
    shares: tuple[tuple[str, float], ...]


class SegmentationTask(nn.Module):
    """A segmentation network with its loss, metrics and decoding; works in any training loop.

        task = SegmentationTask(model, class_names)
        for images, masks in loader:               # (B, 3, H, W); (B, H, W) of classes from 0, 255: ignored
            loss = task.train()((images, masks))["loss"]

        loss = CE(out, mask) + auxiliary_weight * CE(aux, mask) + the methods' terms

    CE is the cross-entropy, averaged over the pixels of the batch that are not ignored, 0 where all are. (By default
    mmsegmentation divides by all pixels.) "aux" is the logits of the network's auxiliary head in training, if it has
    one; of several each counts so. In training images of different sizes are padded, with 255 in their masks.

    In eval mode images and masks may be lists of any sizes, a mask also of another size than its image: logits are
    resized to the mask (`Inference` says how they come to be), and the loss is the mean over images of their CE.

    Raises ValueError where the model has another number of classes than there are names, for masks with other values
    than classes and 255, and for images that no mask belongs to.
    """

    name = "segmentation"
    main_metric = "miou"  # what choices are made by

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        auxiliary_weight: float = 0.4,
        inference: Inference = Inference(),  # noqa: B008  (frozen)
    ):
        super().__init__()
        if auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must not be negative, got {auxiliary_weight}")
        classes = class_count(model)
        if classes not in (None, len(class_names)):
            raise ValueError(
                f"the model segments {classes} classes and the data have {len(class_names)}; pass "
                f"num_classes={len(class_names)} to create_backbone"
            )
        if len(class_names) > IGNORED:
            raise ValueError(f"masks have room for {IGNORED} classes, and these are {len(class_names)}")
        self.model = model
        self.class_names = list(class_names)
        self.auxiliary_weight, self.inference = auxiliary_weight, inference

    def forward(self, batch: Sequence[Any]) -> dict[str, Any]:
        """(images, masks) -> {"loss": scalar, "output": logits, in training (B, K, H, W), else a list of (K, H, W) in
        the sizes of the masks, "losses": the loss's terms, detached, "terms": the same with their graph}."""
        images, masks = batch
        if len(images) != len(masks):
            raise ValueError(f"{len(images)} images and {len(masks)} masks: each image needs one")
        with noting():
            output, terms = self._trained(images, masks) if self.training else self._evaluated(images, masks)
            if self.training:
                terms |= method_losses(self.model, output, batch)
        return {
            "loss": sum(terms.values()),
            "output": output,
            "losses": {name: term.detach() for name, term in terms.items()},
            "terms": terms,
        }

    def _trained(self, images: Any, masks: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, masks = _of_one_size(images, 0.0), _of_one_size(masks, IGNORED)
        self._check(masks)
        found = self.model(images)
        terms = {"cross_entropy": cross_entropy(found["out"], masks)}
        further = found.get("aux", ())
        further = (further,) if isinstance(further, Tensor) else further
        if len(further):
            terms["auxiliary"] = self.auxiliary_weight * sum(cross_entropy(each, masks) for each in further)
        return found["out"].float(), terms

    def _evaluated(self, images: Any, masks: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        output = segment(self.model, images, [_size(mask) for mask in masks], self.inference)
        for mask in masks:
            self._check(mask)
        losses = [cross_entropy(logits[None], mask[None]) for logits, mask in zip(output, masks, strict=True)]
        return output, {"cross_entropy": torch.stack(losses).mean()}

    def segment(self, images: Any, sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """Logits (K, H, W) of each image (3, h, w), in the size (H, W) wanted of it, None for its own. In eval
        mode."""
        return segment(
            self.model, images, [_size(image) for image in images] if sizes is None else sizes, self.inference
        )

    def _check(self, masks: Tensor) -> None:
        wrong = (masks != IGNORED) & ((masks < 0) | (masks >= len(self.class_names)))
        if bool(wrong.any()):
            raise ValueError(
                f"the mask's value {int(masks[wrong][0])} names no class: there are {len(self.class_names)}, "
                f"counted from 0, and {IGNORED} for what is ignored"
            )

    def new_metrics(self) -> MetricCollection:
        """Fresh metrics: "miou", "mean_accuracy", "pixel_accuracy" (`PixelConfusion`)."""
        from torchmetrics import MetricCollection

        from deltalens.tasks.pixel_metrics import PixelConfusion

        return MetricCollection({"pixels": PixelConfusion(len(self.class_names), IGNORED)}, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, result: dict[str, Any], batch: Sequence[Any]) -> None:
        """Add one batch's result to metrics made by `new_metrics`."""
        for logits, mask in zip(result["output"], batch[1], strict=True):
            metrics.update(resized(logits[None], _size(mask))[0].argmax(0), mask)

    def per_class(self, metrics: MetricCollection) -> dict[str, float]:
        """Class name -> IoU; NaN for a class that the data do not have."""
        return dict(zip(self.class_names, metrics["pixels"].iou().tolist(), strict=True))

    def decode(self, output: Sequence[Tensor] | Tensor) -> list[Segmented]:
        """Logits (K, H, W) of each image -> its mask and the shares of the classes in it."""
        return [self._decoded(logits.argmax(0)) for logits in output]

    def _decoded(self, mask: Tensor) -> Segmented:
        counts = torch.bincount(mask.reshape(-1), minlength=len(self.class_names)).tolist()
        shares = [(name, count / mask.numel()) for name, count in zip(self.class_names, counts, strict=True) if count]
        return Segmented(mask, tuple(sorted(shares, key=lambda pair: -pair[1])))


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Of logits (B, K, H, W) and masks (B, H, W): the mean over the pixels that are not ignored, 0 where all are."""
    logits, masks = logits.float(), masks.long()
    if torch.are_deterministic_algorithms_enabled():  # of maps torch has no such kernel for GPUs
        logits, masks = logits.movedim(1, -1).flatten(0, -2), masks.flatten()
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def _size(picture: Tensor) -> tuple[int, int]:
    return picture.shape[-2], picture.shape[-1]


def _of_one_size(pictures: Sequence[Tensor] | Tensor, fill: float) -> Tensor:
    """A batch of pictures (..., H, W), padded at the right and below to the largest."""
    if isinstance(pictures, Tensor):
        return pictures
    height, width = (max(picture.shape[side] for picture in pictures) for side in (-2, -1))
    return torch.stack(
        [F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2]), value=fill) for each in pictures]
    )
