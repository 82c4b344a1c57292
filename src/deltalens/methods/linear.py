"""Linear probing: nothing but the head."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, register


@register("linear")
class LinearConfig(Method):
    """Train the head on frozen features, with the backbone in eval mode ("Fixed" in Mona's tables)."""

    head_only: ClassVar = True
    learning_rate: ClassVar = 3e-2
