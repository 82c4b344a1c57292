"""Full fine-tuning: the upper bound in cost, and the baseline every method is measured against."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, register


@register("full")
class FullConfig(Method):
    """Train every backbone parameter and the head.

    The original tensors are kept, so that `detach` and switching give the pretrained backbone back bit for bit; this
    holds a second copy of the backbone. Dropout and drop-path of the backbone stay active.
    """

    frozen_mode: ClassVar = "train"
    learning_rate: ClassVar = 3e-4

    def unfreeze(self, anatomy):
        return [path for path, _ in anatomy.backbone_parameters()]
