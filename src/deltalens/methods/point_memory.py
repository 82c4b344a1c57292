"""Point-PEFT's memory of training clouds, and the prompts that it enriches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.sized_by_data import SizedByData
from deltalens.sites.layout import Layout

PRIOR = "prior features"  # their name in the pass under way


class QuickBottleneck(nn.Module):
    """up( dropout( quick_gelu( down x ))), quick_gelu(a) = a sigmoid(1.702 a). Weights start Xavier-uniform, biases
    N(0, 1e-6^2), as published: not as zero."""

    pointwise = True

    def __init__(self, width: int, bottleneck: int, dropout: float):
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width), dropout
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        return self.up(F.dropout(hidden * torch.sigmoid(1.702 * hidden), self.dropout, self.training))


class PointMemory(SizedByData):
    """`patches`: what a cloud and the training clouds most like it say, for the prompts of the blocks.

        q = max over patches of the backbone's own normed tokens               (B, C), no adapter, no gradient
        w = softmax over the K largest of cos(q, m_i);  f = sum of w_i m_i     m_i: the same features of training clouds
        prior = [q, f, m_1, ..., m_K]                                          (B, K + 2, C)

    features (M, C): the memory, empty until `deltalens.prepare` fills it. No parameters.
    """

    open_length = ("features",)
    reads_plain = True

    def __init__(self, width: int, count: int):
        super().__init__()
        self.register_buffer("features", torch.empty(0, width))
        self.count = count
        self.collected: list[Tensor] | None = None  # of the clouds so far, while the memory is being filled

    @property
    def filled(self) -> bool:
        return len(self.features) > 0

    @torch.no_grad()
    def fill(self, features: Tensor) -> None:
        """features (M, C). ValueError for fewer than K."""
        if len(features) < self.count:
            raise ValueError(
                f"Point-PEFT's prompts read the {self.count} training clouds that are most like a cloud, and there are "
                f"{len(features)}: give more clouds, or set num_prompts to at most {len(features) + 2}"
            )
        self.make_room("features", len(features))
        self.features.copy_(features)

    def recall(self, own: Tensor) -> Tensor:
        """q (B, C) -> prior (B, K + 2, C)."""
        with torch.autocast(own.device.type, enabled=False):
            memory = self.features.to(own.dtype)
            likeness, index = (F.normalize(own, dim=-1) @ F.normalize(memory, dim=-1).T).topk(self.count)
            best = memory[index]
            mixed = likeness.softmax(-1).unsqueeze(1) @ best
            return torch.cat([own.unsqueeze(1), mixed, best], 1)

    def forward(self, tokens: Tensor, plain: Callable[[], Tensor], layout: Layout) -> Tensor:
        own = plain().amax(1)
        if self.collected is not None:
            self.collected.append(own)
            layout.found[PRIOR] = own.unsqueeze(1).expand(-1, self.count + 2, -1)
        elif not self.filled:
            raise RuntimeError(
                "Point-PEFT has no training clouds yet: call deltalens.prepare(model, loader) with the training data "
                "once before training (deltalens.training.fit does it by itself)"
            )
        else:
            layout.found[PRIOR] = self.recall(own)
        return tokens


class PriorPrompts(nn.Module):
    """`tokens.in`: dropout(e) + (prior + bottleneck(prior)) joins the stream behind its prefix. e (1, K + 2, C) is
    learned and starts with std .02."""

    def __init__(self, width: int, count: int, bottleneck: int, dropout: float):
        super().__init__()
        self.embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=0.02))
        self.bottleneck, self.dropout = QuickBottleneck(width, bottleneck, dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        prior = layout.of_pass(PRIOR).to(self.embedding.dtype)
        return layout.insert(x, self.dropout(self.embedding) + prior + self.bottleneck(prior))
