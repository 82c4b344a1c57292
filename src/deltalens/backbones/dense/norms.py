"""Fresh norms on the maps that leave a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers.norm import LayerNorm2d, RmsNorm, RmsNorm2d
from torch import nn

_OF_CHANNELS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
CHOICES = ("auto", "trained", "frozen", None)


def output_norms(norms: str | None, channels: Iterable[int], backbone: nn.Module) -> nn.ModuleList:
    """A LayerNorm over the channels of each map (eps 1e-5), as mmdetection and mmsegmentation put them behind Swin.

    norms: "trained" with weights and biases of its own; "frozen" without, which is what the official Mona code computes
    with its untrained norms (weight 1, bias 0); None for no norms; "auto": "trained" where the backbone has
    LayerNorms or RMSNorms, None where it has none (ResNets). ValueError for anything else.
    """
    if norms not in CHOICES:
        raise ValueError(f"norms must be 'auto', 'trained', 'frozen' or None, got {norms!r}")
    if norms == "auto":
        norms = "trained" if any(isinstance(module, _OF_CHANNELS) for module in backbone.modules()) else None
    if norms is None:
        return nn.ModuleList(nn.Identity() for _ in channels)
    return nn.ModuleList(LayerNorm2d(width, eps=1e-5, affine=norms == "trained") for width in channels)
