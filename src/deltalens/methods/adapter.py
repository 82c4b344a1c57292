"""Adapter (Houlsby et al., ICML 2019, arXiv 1902.00751; Pfeiffer et al., EACL 2021, arXiv 2005.00247): bottlenecks on
the branches of a block, or beside them (He et al., ICLR 2022, arXiv 2110.04366)."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.methods.bottleneck import ParallelBottleneck, SerialBottleneck, serial_slots
from deltalens.sites.anatomy import Anatomy, Site, require

DEFAULT_BOTTLENECK = 64
_BRANCHES = {"houlsby": ("attention", "mlp"), "pfeiffer": ("mlp",)}


@register("adapter")
class AdapterConfig(Method):
    """A bottleneck on the output of a frozen branch, before the residual add; head trained.

        u <- u + A(u),   A(u) = scale * up( dropout( activation( down(u) ) ) ),   x <- x + drop_path(u)

    placement "houlsby": after attention and after the MLP. "pfeiffer": after the MLP only. parallel=True puts it beside
    the branch instead, x <- x + branch(norm x) + A(norm x); reads="stream" gives it x in place of norm x.

    Blocks with one branch (ConvNeXt) get one bottleneck, on that branch. Blocks of unknown networks have no branch to
    see: "pfeiffer" places it at the block's output there, y <- y + A(y); "houlsby" and parallel are a TypeError.
    Parameters per bottleneck: (2 C + 1) n + C.

    up starts at zero, so that training starts from the backbone; init="official" is that of Mona's code, which draws
    both matrices. VPT's code starts all four tensors at zero. Then only the bias of up ever gets a gradient, and the
    adapter is a constant vector for each block; this is not offered. Presets: `houlsby()`, `pfeiffer()`,
    `mona_baseline()`, `vpt_baseline(reduction)`.
    """

    learning_rate: ClassVar = 3e-3

    bottleneck: int | None = setting(
        default=None, help=f"inner width n; {DEFAULT_BOTTLENECK} where neither this nor reduction is given"
    )
    reduction: int | None = setting(default=None, help="inner width as C // reduction, instead of bottleneck")
    placement: str = setting(
        default="houlsby", help="after attention and MLP, or after the MLP only", choices=("houlsby", "pfeiffer")
    )
    parallel: bool = setting(default=False, help="beside the branch instead of on its output")
    reads: str = setting(
        default="norm", help="what a parallel bottleneck reads: norm(x), or x itself", choices=("norm", "stream")
    )
    activation: str = setting(default="gelu", help="between down and up", choices=("gelu", "relu"))
    scale: float = setting(default=1.0, help="factor on what the bottleneck adds")
    dropout: float = setting(default=0.0, help="dropout before the up-projection")
    init: str = setting(default="identity", help="up at zero, or both matrices drawn", choices=("identity", "official"))

    @classmethod
    def houlsby(cls, bottleneck: int = DEFAULT_BOTTLENECK) -> AdapterConfig:
        """After attention and after the MLP, GELU."""
        return cls(bottleneck=bottleneck, placement="houlsby")

    @classmethod
    def pfeiffer(cls, bottleneck: int = DEFAULT_BOTTLENECK) -> AdapterConfig:
        """After the MLP only, ReLU."""
        return cls(bottleneck=bottleneck, placement="pfeiffer", activation="relu")

    @classmethod
    def mona_baseline(cls) -> AdapterConfig:
        """The adapter of Mona's comparison: Houlsby's places, 64 wide, GELU, dropout .1, both matrices drawn."""
        return cls(bottleneck=64, placement="houlsby", dropout=0.1, init="official")

    @classmethod
    def vpt_baseline(cls, reduction: int = 8) -> AdapterConfig:
        """The adapter of VPT's comparison: after the MLP, C // reduction wide (8, 64, 256 there), GELU."""
        return cls(reduction=reduction, placement="pfeiffer")

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck is not None and self.reduction is not None:
            raise ValueError("give bottleneck or reduction, not both")
        for name in ("bottleneck", "reduction"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def place(self, anatomy: Anatomy):
        for block in anatomy.blocks():
            for slot in self._slots(block, anatomy):
                yield block, slot, self._layer(block.width)

    def _slots(self, block: Site, anatomy: Anatomy) -> list[str]:
        if not self.parallel:
            return serial_slots(block, _BRANCHES[self.placement], "Adapter (or set placement to pfeiffer)", anatomy)
        slots = [f"{branch}.parallel" for branch in _BRANCHES[self.placement]]
        for slot in slots:
            require(block, slot, "Adapter (or set parallel to False)", anatomy.model)
        return slots

    def _layer(self, width: int):
        settings = (width, self._bottleneck(width), self.activation, self.scale, self.dropout, self.init)
        return ParallelBottleneck(*settings, reads=self.reads) if self.parallel else SerialBottleneck(*settings)

    def _bottleneck(self, width: int) -> int:
        if self.reduction is None:
            return self.bottleneck or DEFAULT_BOTTLENECK
        if width < self.reduction:
            raise ValueError(f"reduction={self.reduction} leaves nothing of a stream of {width} channels")
        return width // self.reduction
