"""MMA (Yang et al., Multi-Modal Adapter, CVPR 2024): coupled adapters in the top layers of both CLIP towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, check_choices, register, setting
from deltalens.sites.anatomy import Anatomy, Site, Tower, require


class _ScaledGradient(torch.autograd.Function):
    """The identity; gradients are multiplied by a factor."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class ModalityAdapter(nn.Module):
    """`block.parallel` of one block: alpha up( relu( shared( relu( down(n) ) ) ) ), shared with the other tower.

    shared: a linear layer (r, r) or None. decoupled: weights get their true gradient divided by alpha, the stream its
    true one. The result is float32 where the stream is half precision (autocast), so that the stream is float32 from
    here on: alpha times the branch is lost when rounded to bfloat16 beside values near 1.
    """

    pointwise = True

    def __init__(
        self, width: int, rank: int, shared: nn.Linear | None, alpha: float, decoupled: bool, reads_stream: bool
    ):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        for layer in (self.down, self.up):
            _start(layer)
        if shared is not None:
            self.shared = shared
        self.alpha, self.decoupled, self.reads_stream = alpha, decoupled, reads_stream

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """Stream (..., C) and norm_1 of it -> what is added to the block's output."""
        if x.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"MMA adds {self.alpha:g} times its branch to the stream, which a model in {x.dtype} rounds away: keep "
                "the model in float32 and use autocast (--precision bf16-mixed)"
            )
        branch = x if self.reads_stream else normed
        branch = _ScaledGradient.apply(branch, self.alpha) if self.decoupled else branch
        hidden = torch.relu(self.down(branch))
        if "shared" in self._modules:
            hidden = torch.relu(self.shared(hidden))
        branch = self.up(hidden)
        branch = self.alpha * branch.to(torch.promote_types(branch.dtype, torch.float32))
        return _ScaledGradient.apply(branch, 1 / self.alpha) if self.decoupled else branch


class StreamAdapter(ModalityAdapter):
    """The same before the first block: x + adapter(x), of the words before their positions are added, or of the image
    tokens behind the first norm."""

    def forward(self, x: Tensor, *context) -> Tensor:
        return x + super().forward(x, x)


def _start(layer: nn.Linear) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)


@register("mma")
class MMAConfig(Method):
    """Adapters beside whole blocks `start` to `end` of both CLIP towers; the middle matrix of each pair is one.

        x <- block(x) + alpha * up( relu( shared( relu( down( n_1 ) ) ) ) )

    n_1 is the block's own frozen first norm of its input (B, N, C), as the official code has it; the paper's formula
    has the input itself (`input="stream"`). down (r, C), up (C, r) with biases for each tower and block, shared (r, r)
    for each block of both. All weights are drawn Kaiming-normal (fan out), biases zero: up is not zero, so that the
    model differs from CLIP by alpha from the start.

    The official code multiplies gradients inside the branch: each adapter weight gets 1 / alpha times its true
    gradient, the stream its true one (`decoupled`). With SGD, momentum and weight decay that is lr / alpha and
    alpha * weight decay without it.

    start and end are numbers from 1, both included, as the official code counts; 0 is before the first block (there
    gradients are as they are). In towers of different depth they count blocks of the shallower one, paired with those
    of the other from the top: 5 of 12 goes with 17 of 24.

    Published settings: 5 to 12 from base to novel classes, 9 to 12 across data sets (`MMAConfig.cross_dataset()`); SGD
    0.0015, 5 epochs of batches of 16, on ImageNet 128. Parameters of ViT-B/16, r = 32, 5 to 12: 674,560. Needs a model
    with an image and a text tower in float32.
    """

    learning_rate: ClassVar = 1e-3

    start: int = setting(default=5, help="first block, from 1; 0 for the embeddings, too")
    end: int | None = setting(default=None, help="last block; null for the last one")
    bottleneck: int = setting(default=32, help="inner width r")
    alpha: float = setting(default=0.001, help="factor on what the adapters add")
    shared: bool = setting(default=True, help="a matrix that both towers share in each pair")
    towers: str = setting(default="both", help="where adapters are", choices=("both", "vision", "text"))
    input: str = setting(
        default="norm", help="what adapters read: the block's first norm, or its input", choices=("norm", "stream")
    )
    decoupled: bool = setting(default=True, help="gradients of the weights are divided by alpha")

    @classmethod
    def cross_dataset(cls) -> MMAConfig:
        """What the paper trains on ImageNet for other data sets: blocks 9 to 12, 337,280 parameters on ViT-B/16."""
        return cls(start=9)

    def __post_init__(self):
        check_choices(self)
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise ValueError(f"start and end must be 0 <= start <= end, got {self.start} and {self.end}")

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        vision, text = _pair_of_towers(anatomy)
        depth = min(len(vision.blocks), len(text.blocks))
        end = depth if self.end is None else self.end
        beyond = {"start": self.start, "end": end}
        for name, number in beyond.items():
            if number > depth:
                raise ValueError(
                    f"{name}={number} is beyond the {depth} blocks of {type(anatomy.model).__name__}'s towers"
                )
        chosen = [tower for tower in (vision, text) if self.towers in ("both", tower.name)]
        for number in range(self.start, end + 1):
            shared = nn.Linear(self.bottleneck, self.bottleneck) if self.shared else None
            if shared is not None:
                _start(shared)
            for tower in chosen:
                if number == 0:
                    yield self._at_the_embedding(tower, shared, anatomy)
                    continue
                block = tower.blocks[number - 1 + len(tower.blocks) - depth]
                require(block, "block.parallel", "MMA", anatomy.model)
                yield block, "block.parallel", self._adapter(ModalityAdapter, block, shared, self.decoupled)

    def _at_the_embedding(self, tower: Tower, shared: nn.Linear | None, anatomy: Anatomy) -> Placement:
        site, slot = (tower.blocks[0], "tokens.in")
        if tower.name == "text":
            if tower.owner is None:
                raise TypeError("MMA before the first block (start=0) needs a classifier made of class names")
            site, slot = tower.owner, "text.context"
        require(site, slot, "MMA", anatomy.model)
        return site, slot, self._adapter(StreamAdapter, tower.blocks[0], shared, False)

    def _adapter(self, cls: type[ModalityAdapter], block: Site, shared: nn.Linear | None, decoupled: bool) -> nn.Module:
        return cls(block.width, self.bottleneck, shared, self.alpha, decoupled, self.input == "stream")


def _pair_of_towers(anatomy: Anatomy) -> Sequence[Tower]:
    towers = {tower.name: tower for tower in anatomy.towers}
    if towers.keys() != {"vision", "text"}:
        raise TypeError(
            f"MMA needs one image tower and one text tower; {type(anatomy.model).__name__} has "
            f"{', '.join(towers) or 'none'}"
        )
    return towers["vision"], towers["text"]
