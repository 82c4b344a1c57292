"""Which experts of Adapter-X are used: shares of sub-tokens for each block and each class."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltalens.methods.smoa import chosen_experts

if TYPE_CHECKING:
    from deltalens.methods.adapter_x import BlockExperts

DEAD = 0.1  # of an equal share


@dataclass(frozen=True)
class ExpertUse:
    """Counts of sub-tokens. blocks: paths of the blocks. pools: which pool each block has, by number. by_block (blocks,
    N); by_class (classes, pools, N), None without labels."""

    blocks: list[str]
    pools: list[int]
    by_block: Tensor
    by_class: Tensor | None = None

    def of_blocks(self) -> Tensor:
        """Shares (blocks, N), each row with sum 1."""
        return _shares(self.by_block)

    def of_classes(self, pool: int = 0) -> Tensor:
        """Shares (classes, N) over all blocks of a pool; rows of classes without images are zero."""
        return _shares(self.by_class[:, pool])

    def of_pool(self, pool: int) -> Tensor:
        """Shares (N,) over all blocks of a pool."""
        return _shares(self.by_block[[number for number, each in enumerate(self.pools) if each == pool]].sum(0))

    def dead(self) -> dict[int, list[int]]:
        """Pool -> its experts that get less than a tenth of an equal share, from 0; pools without any are left out."""
        limit = DEAD / self.by_block.shape[1]
        found = {pool: (self.of_pool(pool) < limit).nonzero().flatten().tolist() for pool in sorted(set(self.pools))}
        return {pool: experts for pool, experts in found.items() if experts}

    def warnings(self) -> list[str]:
        """A sentence for each pool with dead experts."""
        several = len(set(self.pools)) > 1
        return [
            f"Adapter-X: {_named(experts)} of {self.by_block.shape[1]}"
            f"{f' in the pool of {self._first_block(pool)}' if several else ''} "
            f"{'get' if len(experts) > 1 else 'gets'} less than {DEAD:.0%} of an equal share of sub-tokens: raise "
            "balance, or train with fewer experts"
            for pool, experts in self.dead().items()
        ]

    def _first_block(self, pool: int) -> str:
        return self.blocks[self.pools.index(pool)]


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def _named(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return f"expert{'s' if len(experts) > 1 else ''} {shown}"


@torch.no_grad()
def expert_use(model: nn.Module, loader: Iterable, classes: int | None = None, batches: int | None = None) -> ExpertUse:
    """Run images through a model with Adapter-X in eval mode and count first choices.

    loader: (images, labels) batches. classes: count for so many classes, too; labels are then integers. batches: at
    most so many. ValueError without Adapter-X, with a single expert, or without an image.
    """
    from deltalens.methods.adapter_x import BlockExperts

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, BlockExperts)]
    found = [(path, module) for path, module in found if module.pool.experts > 1]
    pools = list({id(module.pool): module.pool for _, module in found}.values())
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts to count: it takes an adapter of Adapter-X with N > 1")
    number = {id(pool): i for i, pool in enumerate(pools)}
    experts, device = pools[0].experts, next(model.parameters()).device
    by_block = {path: torch.zeros(experts, dtype=torch.float64) for path, _ in found}
    by_class = None if classes is None else torch.zeros(classes, len(pools), experts, dtype=torch.float64)
    with _evaluating(model), _recorded(found) as chosen:
        for count, (images, labels) in enumerate(loader):
            if count == batches:
                break
            chosen.clear()
            model(images.to(device))
            for path, module in found:
                per_image = chosen.get(path)  # an adapter that is not active is not called
                if per_image is None:
                    continue
                by_block[path] += per_image.sum(0)
                if by_class is not None:
                    by_class[:, number[id(module.pool)]].index_add_(0, labels.cpu(), per_image)
    used = [(path, module) for path, module in found if by_block[path].any()]
    if not used:
        raise ValueError("there is no image to count with, or Adapter-X is not active")
    blocks = [path.partition(".delta.")[0] for path, _ in used]
    counts = torch.stack([by_block[path] for path, _ in used])
    return ExpertUse(blocks, [number[id(module.pool)] for _, module in used], counts, by_class)


def dead_expert_remarks(model: nn.Module, loader: Iterable, batches: int = 4) -> list[str]:
    """What a user should know of dead experts, from a few batches."""
    return expert_use(model, loader, batches=batches).warnings()


@contextlib.contextmanager
def _recorded(modules: list[tuple[str, BlockExperts]]) -> Iterator[dict[str, Tensor]]:
    """Path -> first choices of each image (B, N) in the last call."""
    chosen: dict[str, Tensor] = {}

    def record(path: str, module: BlockExperts, inputs: tuple) -> None:
        *_, read, layout = inputs
        features = layout.features(read)
        counts = chosen_experts(module.pool.routed(features)).view(len(features), -1, module.pool.experts).sum(1)
        chosen[path] = counts.double().cpu()

    handles = [module.register_forward_pre_hook(functools.partial(record, path)) for path, module in modules]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
