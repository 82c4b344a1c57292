"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) on the linear parts of blocks, fused or not."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, Family, Part, Site, having, require
from deltalens.sites.weights import part_shape, refuse_unfit_target


class LoRALayer(nn.Module):
    """dy = scaling * B A dropout(x):  A (r, in) Kaiming-uniform (a = sqrt 5), B (out, r) zero, scaling = alpha / r."""

    pointwise = True

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(self.dropout(x))) * self.scaling

    def weight_change(self) -> Tensor:
        """The change of the layer's weight, (out, in)."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scaling


@register("lora")
class LoRAConfig(Method):
    """W x  ->  W x + (alpha / r) B A x  on chosen linear parts of every block; head trained.

    In hybrid networks blocks of convolutions, which have none of the parts, are passed over.

    Parts are q, k, v, proj, fc1, fc2, each with its own A and B, also inside a fused qkv layer (what peft cannot do).
    target_modules instead names whole nn.Linear layers as peft does: a regular expression that matches the full path,
    or a list of path endings; a fused qkv then gets one A and B. An nn.MultiheadAttention of a known family stands for
    its fused q, k and v, and `out_proj` for itself; to peft the attention means both. Parameters per part:
    r (in + out). Merging is exact up to rounding. Mona's official code uses r=64, q and v, alpha=1 on Swin; presets:
    `LoRAConfig.mona_baseline()`, and `LoRAConfig.clip()` for both towers of a CLIP.
    """

    learning_rate: ClassVar = 5e-3

    r: int = setting(default=8, help="rank")
    alpha: float = setting(default=8.0, help="scaling numerator: the change is multiplied by alpha / r")
    parts: tuple[str, ...] = setting(default=("q", "v"), help="linear parts of a block: q, k, v, proj, fc1, fc2")
    target_modules: str | tuple[str, ...] | None = setting(
        default=None, help="peft-style layer names instead of parts: one regular expression, or path endings"
    )
    dropout: float = setting(default=0.0, help="dropout on the input of A")

    @classmethod
    def mona_baseline(cls) -> LoRAConfig:
        """The LoRA of Mona's comparison: r=64 on q and v, scaling 1/64."""
        return cls(r=64, alpha=1.0, parts=("q", "v"))

    @classmethod
    def clip(cls) -> LoRAConfig:
        """CLIP-LoRA (Zanella and Ben Ayed, Low-rank few-shot adaptation of vision-language models, CVPR-W 2024,
        arXiv 2405.18541): r=2 on q, k and v of every block of both towers, dropout 0.25.

        Its code divides alpha = 1 by sqrt(r) instead of r, which alpha = sqrt(2) does here. Parameters of ViT-B/16:
        184,320. Published with AdamW 2e-4, weight decay 0.01, cosine to 1e-6, batch 32, 500 steps times shots.
        """
        return cls(r=2, alpha=math.sqrt(2), parts=("q", "k", "v"), dropout=0.25)

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if not self.parts and self.target_modules is None:
            raise ValueError("parts is empty; name at least one of q, k, v, proj, fc1, fc2")

    def place(self, anatomy: Anatomy):
        if self.target_modules is not None:
            yield from self._place_by_name(anatomy)
            return
        for block in having(anatomy.blocks(), [f"weights:{name}" for name in self.parts]):
            for name in self.parts:
                require(block, f"weights:{name}", "LoRA (or set target_modules to layer names)", anatomy.model)
                yield block, f"weights:{name}", self._layer(block, block.parts[name])

    def _layer(self, block: Site, part: Part) -> LoRALayer:
        outputs, inputs = part_shape(block.module, part)
        return LoRALayer(inputs, outputs, self.r, self.alpha, self.dropout)

    def _place_by_name(self, anatomy: Anatomy):
        found = False
        for path, module in anatomy.model.named_modules():
            if "delta" in path.split(".") or not self._names(anatomy.canonical(path)):
                continue
            refuse_unfit_target(anatomy, path, module)
            found = True
            outputs, inputs = part_shape(module, Part(""))
            site = Site(path, module, _WHOLE_LAYER, inputs)
            yield site, "weights:all", LoRALayer(inputs, outputs, self.r, self.alpha, self.dropout)
        if not found:
            raise ValueError(
                f"target_modules={self.target_modules!r} matches no layer of {type(anatomy.model).__name__}"
            )

    def _names(self, path: str) -> bool:
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return any(path == name or path.endswith("." + name) for name in self.target_modules)


_WHOLE_LAYER = Family(name="deltalens.methods.lora:_WHOLE_LAYER", methods={}, parts=lambda layer: {"all": Part("")})
