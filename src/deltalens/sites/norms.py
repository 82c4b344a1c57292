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


def stream_norms(block: nn.Module, width: int) -> list[str]:
    """Names of the norms that a block itself has on its stream, in the order in which it made them: in all known blocks
    the order of its branches, the MLP's last. Norms inside of attentions and MLPs, and norms with running statistics,
    are not among them."""
    return [
        name
        for name, module in block.named_children()
        if is_norm(module)
        and not isinstance(module, nn.modules.batchnorm._NormBase)
        and getattr(module, "weight", None) is not None
        and module.weight.numel() == width
    ]
