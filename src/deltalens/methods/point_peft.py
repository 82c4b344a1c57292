"""Point-PEFT (Tang et al., AAAI 2024, arXiv 2310.03059): prompts from like clouds, and a geometry-aware adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.point_geometry import GeometryAdapter, LocalAttention
from deltalens.methods.point_memory import PointMemory, PriorPrompts, QuickBottleneck
from deltalens.methods.points import point_towers, require_class_token
from deltalens.methods.ssf import SSFLayer
from deltalens.models.point_blocks import TwoStreamBlock
from deltalens.models.point_transformer import PointTransformer
from deltalens.sites.anatomy import Anatomy, Family, Part, Site, Tower, require
from deltalens.sites.weights import output_channels


class ScaledBottleneck(QuickBottleneck):
    """`mlp.inner`: u + scale * bottleneck(u)."""

    def __init__(self, width: int, bottleneck: int, dropout: float, scale: float):
        super().__init__(width, bottleneck, dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * super().forward(x)


class Shift(nn.Module):
    """y + shift: a bias that is trained beside the frozen one. Starts at zero."""

    transforms_output = True
    channelwise = True
    pointwise = True

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        return (y + self.shift[rows]).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight, bias + self.shift


@register("point_peft")
class PointPEFTConfig(Method):
    """Prompts from the training clouds most like a cloud, and an adapter in which patches read their neighbours.

        prior = [q, sum of w_i m_i, m_1, ..., m_K]                    (B, K + 2, C), once for each cloud
        p_l   = dropout(e_l) + prior + A_l(prior)                     blocks of the first half: K + 2 tokens
        u    <- u + .7 A'_l(u)                                        u = MLP(LN x), every block
        x_i  <- x_i + .3 sum_j w_ij h_j;  x <- x + A''_l(x)           every block, behind it; the prompts leave here

    q is the maximum over the patches that the frozen backbone gives without class token, m_i the same of training
    clouds, the K nearest by cosine, w their softmax: attention without parameters. h are neighbourhoods in space: the G
    / 2 farthest patches with k / 2 neighbours each, k the model's group size, read by one narrow attention for all
    blocks, maximum, BatchNorm, GELU, plus .3 of the centre's token; w_ij are inverse squared distances. The A are
    bottlenecks with QuickGELU. Trained besides: biases of norm1, proj, norm2, fc1, fc2, the last norm, class tokens,
    the head.

    The memory is made by `deltalens.prepare` from training clouds (`deltalens.training.fit` calls it), C numbers for
    each, and saved with the adapter. Each pass runs the frozen blocks a second time, without gradients.

    Parameters of Point-MAE with 15 classes: 710,749, published as 0.7M: bottlenecks 304,512, those of prompts 39,216,
    prompts 23,040 + 30, attention 28,800, BatchNorm 9,216, biases 36,864, last norm 768, class token 768, head 267,535.
    The official code registers prompts for all 12 blocks and factors that it never reads (773,017 together).

    Where the official code differs: its memory is a file of unknown making; here it holds raw features of training
    clouds as they come, compared by cosine. In the first half it samples points with the prompts' places among them,
    and reads rows of the token matrix with indices of another length, so that a cloud reads others of its batch; here
    patches and prompts are grouped together by where they are. Drop path is off here, there it acts on the MLP and the
    narrow attention. Biases are trained as shifts beside the frozen ones, the last norm as scale and shift behind it,
    so that the backbone's own features stay at hand. Point-PEFT is for one stream; ReCon's blocks, which have two, are
    refused.
    """

    learning_rate: ClassVar = 5e-4

    bottleneck: int = setting(default=16, help="inner width of the bottlenecks in every block")
    num_prompts: int = setting(default=10, help="prompts K + 2; K training clouds are read")
    prompt_bottleneck: int = setting(default=8, help="inner width of the prompts' bottlenecks")
    prompt_blocks: int | None = setting(default=None, help="how many blocks from the first have prompts; None: half")
    inner: int = setting(default=18, help="channels of the narrow attention")
    heads: int = setting(default=6, help="heads of the narrow attention")
    scale: float = setting(default=0.7, help="factor on the bottleneck behind the MLP")
    share: float = setting(default=0.3, help="factor on what neighbourhoods give")
    dropout: float = setting(default=0.1, help="dropout of prompts and in bottlenecks")

    def __post_init__(self):
        for name in ("bottleneck", "prompt_bottleneck", "inner", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.inner % self.heads:
            raise ValueError(f"inner={self.inner} is not a multiple of heads={self.heads}")
        if self.num_prompts < 3:
            raise ValueError(f"num_prompts must be at least 3 (cloud, mixture, one like it), got {self.num_prompts}")
        if self.prompt_blocks is not None and self.prompt_blocks < 0:
            raise ValueError(f"prompt_blocks must not be negative, got {self.prompt_blocks}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        for tower, owner in point_towers(anatomy, "Point-PEFT"):
            require_class_token(tower, "Point-PEFT", anatomy)
            first = self._prompted(tower)
            shape = _neighbourhoods(owner.module)
            local = LocalAttention(owner.width, self.inner, self.heads, self.num_prompts if first else 0)
            if first:
                yield owner, "patches", PointMemory(owner.width, self.num_prompts - 2)
            for block in tower.blocks:
                yield from self._block(block, block.index < first, local, shape, anatomy)
            site = Site(f"{owner.path}.norm".lstrip("."), owner.module.norm, _LAYER, owner.width)
            yield site, "weights:all", SSFLayer(owner.width, std=0)

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        for tower, _ in point_towers(anatomy, "Point-PEFT"):
            yield from tower.class_tensors

    def prepare(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Fill the memories that are empty. loader: batches of clouds (B, N, 3), or of (clouds, labels)."""
        memories = [module for module in model.modules() if isinstance(module, PointMemory) and not module.filled]
        if not memories:
            return
        own = next(model.parameters())
        try:
            for memory in memories:
                memory.collected = []
            for batch in loader:
                clouds = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(clouds.to(own.device, own.dtype))
            for memory in [memory for memory in memories if memory.collected]:  # inactive adapters saw nothing
                memory.fill(torch.cat(memory.collected))
        finally:
            for memory in memories:
                memory.collected = None

    # ------------------------------------------------------------------ details
    def _prompted(self, tower: Tower) -> int:
        """How many blocks have prompts."""
        if any(isinstance(block.module, TwoStreamBlock) for block in tower.blocks):
            raise TypeError(
                "Point-PEFT is for blocks with one stream, and ReCon's have two: use points/point-mae, points/act or "
                "points/point-bert, or another method"
            )
        count = len(tower.blocks) // 2 if self.prompt_blocks is None else self.prompt_blocks
        if count > len(tower.blocks):
            raise ValueError(f"prompt_blocks={count} is more than the {len(tower.blocks)} blocks of this model")
        return count

    def _block(
        self, block: Site, prompted: bool, local: LocalAttention, shape: tuple[int, int], anatomy: Anatomy
    ) -> Iterator[Placement]:
        for slot in ("tokens.in", "tokens.out", "mlp.inner"):
            require(block, slot, "Point-PEFT", anatomy.model)
        if prompted:
            prompts = PriorPrompts(block.width, self.num_prompts, self.prompt_bottleneck, self.dropout)
            yield block, "tokens.in", prompts
        yield block, "mlp.inner", ScaledBottleneck(block.width, self.bottleneck, self.dropout, self.scale)
        yield block, "tokens.out", self._geometry(block, prompted, local, shape)
        for name, layer in block.module.named_modules():
            shape_of = None if "delta" in name.split(".") else output_channels(layer)
            if shape_of is not None and layer.bias is not None:
                yield Site(f"{block.path}.{name}", layer, _LAYER, shape_of[0]), "weights:all", Shift(shape_of[0])

    def _geometry(self, block: Site, prompted: bool, local: LocalAttention, shape: tuple[int, int]) -> GeometryAdapter:
        return GeometryAdapter(
            block.width,
            local,
            self.num_prompts if prompted else 0,
            shape,
            self.bottleneck,
            dropout=self.dropout,
            share=self.share,
        )


def _neighbourhoods(owner: PointTransformer) -> tuple[int, int]:
    """(how many of the patches are centres, how many tokens are around each)."""
    centres, neighbours = owner.num_groups // 2, owner.group_size // 2
    if not centres or not neighbours or neighbours > owner.num_groups:
        raise ValueError(
            f"Point-PEFT takes half of the patches and half of the group size as neighbourhoods, and this model has "
            f"{owner.num_groups} patches of {owner.group_size} points: it needs at least 2 of 2, and as many patches "
            "as half the group size"
        )
    return centres, neighbours


_LAYER = Family(name="deltalens.methods.point_peft:_LAYER", methods={}, parts=lambda layer: {"all": Part("")})
