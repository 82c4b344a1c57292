"""Which modules are normalisation layers."""

from __future__ import annotations

import re

from torch import nn

from deltalens.sites.swap import original_class

_CLASSES = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_NAMES = re.compile(r"(Layer|Batch|Group|Instance|RMS|Rms|Simple|Evo|Response)Norm")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: of one of torch's classes, or of a class that is called so, as
    libraries have their own (timm's `RmsNorm` and `SimpleNorm`, `LlamaRMSNorm`)."""
    return isinstance(module, _CLASSES) or _NAMES.search(original_class(module).__name__) is not None
