"""What timm's CaiT and XCiT share: patch tokens alone, and a class token that joins in class-attention blocks.

The class-attention blocks are no blocks of the tower. Their stream is one token without a map, and patch tokens pass
them for reading only; methods of blocks (Mona, VPT, adapters) act on the patch blocks. Layers are reached by name, in
SSF, BitFit, NormTuning, Partial-k and LoRA's target_modules. Tokens that adapters added do not get there.
"""

from __future__ import annotations

from torch import Tensor, nn

from deltalens.sites.anatomy import Family
from deltalens.sites.swap import original_method


def _forward_cls(self: nn.Module, x: Tensor) -> Tensor:
    return original_method(self, "forward_cls")(self.__dict__["delta_layout"].trim(x))


def _forward_intermediates(
    self: nn.Module,
    x: Tensor,
    indices=None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
):
    """timm's method; tokens that adapters added to the stream never leave it."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    result = original_method(self, "forward_intermediates")(x, indices, norm, stop_early, "NLC", intermediates_only)
    final, taken = (None, result) if intermediates_only else result
    maps = [self.__dict__["delta_layout"].split(tokens)[0] for tokens in taken]
    taken = [m.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else m.flatten(1, 2) for m in maps]
    return taken if intermediates_only else (final, taken)


OWNER = Family(
    name="deltalens.backbones.timm.class_attention:OWNER",
    methods={"forward_cls": _forward_cls, "forward_intermediates": _forward_intermediates},
)
