"""AdaptFormer (Chen et al., NeurIPS 2022, arXiv 2205.13535): a scaled bottleneck beside the MLP."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.methods.bottleneck import ParallelBottleneck, SerialBottleneck, serial_slots
from deltalens.sites.anatomy import require


@register("adaptformer")
class AdaptFormerConfig(Method):
    """A bottleneck beside the MLP of every block, reading the stream x and not its norm; head trained.

        x <- x + drop_path( MLP(norm x) ) + s * up( dropout( relu( down(x) ) ) )

    x is the stream after attention. form="serial" places it on the MLP's output instead, u <- u + s * up(...(u)).
    The defaults are the official ones: ReLU, s = .1, dropout .1, down Kaiming-uniform and up zero (LoRA's). Mona's
    comparison uses GELU and draws both matrices: `AdaptFormerConfig.mona_baseline()`.

    Parameters per block: (2 C + 1) n + C. Blocks without norm(x) on their stream (ConvNeXt, unknown networks) offer no
    place beside the MLP; form="serial" works on them, on the MLP's output or on the block's.
    """

    learning_rate: ClassVar = 3e-3

    bottleneck: int = setting(default=64, help="inner width n")
    scale: float = setting(default=0.1, help="factor s on what the bottleneck adds")
    dropout: float = setting(default=0.1, help="dropout before the up-projection")
    form: str = setting(default="parallel", help="beside the MLP, or on its output", choices=("parallel", "serial"))
    activation: str = setting(default="relu", help="between down and up", choices=("relu", "gelu"))
    init: str = setting(
        default="lora", help="up at zero, or both matrices drawn as in Mona's code", choices=("lora", "official")
    )

    @classmethod
    def mona_baseline(cls) -> AdaptFormerConfig:
        """The AdaptFormer of Mona's comparison: 64 wide, GELU, both matrices drawn."""
        return cls(activation="gelu", init="official")

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def place(self, anatomy):
        for block in anatomy.blocks():
            settings = (block.width, self.bottleneck, self.activation, self.scale, self.dropout, self.init)
            if self.form == "serial":
                for slot in serial_slots(block, ("mlp",), "AdaptFormer (serial)", anatomy):
                    yield block, slot, SerialBottleneck(*settings)
            else:
                require(block, "mlp.parallel", "AdaptFormer (or set form to serial)", anatomy.model)
                yield block, "mlp.parallel", ParallelBottleneck(*settings)
