"""Class prototypes as prompts: what the frozen backbone makes, on average, of each class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltalens.backbones import describe
from deltalens.methods.vpt_prompts import Prompts
from deltalens.sites.anatomy import Tower
from deltalens.sites.slots import Slots


def class_prototypes(model: nn.Module, loader: Iterable) -> Tensor:
    """Mean class token of every class at every depth of the frozen backbone, (classes, blocks + 1, C).

    Entry 0 is the input of the first block, entry i the output of block i, all before the final norm. Where there is no
    class token, the mean of all tokens takes its place. Adapters are switched off meanwhile.

    loader: yields (images, labels, ...), labels being integers from 0; every class must occur. The model's first tower
    is read; TypeError where its blocks differ in width (Swin), ValueError for missing classes.
    """
    means = block_means(model, loader)[0]
    stack = [*means.inputs[:1], *means.outputs]
    if len({tensor.shape for tensor in stack}) > 1:
        raise TypeError(f"the blocks of {type(model).__name__} differ in width: its prototypes are not one tensor")
    return torch.stack(stack, 1)


@dataclass
class BlockMeans:
    """Per block of a tower, (classes, C): the mean input and the mean output of every class."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def block_means(model: nn.Module, loader: Iterable) -> list[BlockMeans]:
    """One BlockMeans per tower. loader: see `class_prototypes`."""
    towers = describe(model).towers
    taken: dict[tuple[int, str, int], Tensor] = {}
    handles = []
    for t, tower in enumerate(towers):
        for i, block in enumerate(tower.blocks):
            handles.append(block.module.register_forward_pre_hook(_taker(taken, (t, "inputs", i), tower)))
            handles.append(block.module.register_forward_hook(_taker(taken, (t, "outputs", i), tower)))
    reference = next(model.parameters())
    sums: dict[tuple[int, str, int], Tensor] = {}
    seen: Tensor = torch.zeros(0)
    try:
        with _plain(model):
            for images, labels, *_ in loader:
                labels = torch.as_tensor(labels, device=reference.device)
                if labels.dim() != 1:
                    raise ValueError("class prototypes need one label an image; choose another init for several labels")
                counts = torch.bincount(labels).double()
                seen = _grown(seen.to(counts), len(counts)) + _grown(counts, len(seen))
                taken.clear()
                model(images.to(reference))
                for place, value in taken.items():
                    added = value.new_zeros(len(counts), value.shape[-1]).index_add_(0, labels, value)
                    known = sums.get(place, added[:0])
                    sums[place] = _grown(known, len(added)) + _grown(added, len(known))
    finally:
        for handle in handles:
            handle.remove()
    missing = [str(i) for i, count in enumerate(seen) if not count]
    if missing or not len(seen):
        raise ValueError(f"class prototypes need images of every class; none of class {', '.join(missing[:5]) or 0}")
    found = [BlockMeans() for _ in towers]
    for t, kind, i in sorted(sums):
        getattr(found[t], kind).append(sums[t, kind, i] / seen[:, None])
    return found


def fill_prompts(model: nn.Module, loader: Iterable, num_tokens: int) -> None:
    """Start the active prompts that wait for class prototypes from those of the loader's images."""
    prompts = [
        module
        for slots in model.modules()
        if isinstance(slots, Slots)
        for module in slots.all_live()
        if isinstance(module, Prompts) and not module.look() and len(module.embedding) == num_tokens
    ]
    if not prompts:
        return
    means = block_means(model, loader)
    classes = len(means[0].outputs[0])
    if classes != num_tokens:
        raise ValueError(
            f"prompts that start from class prototypes are one per class: the images have {classes} classes, "
            f"num_tokens is {num_tokens}; set num_tokens={classes}"
        )
    with torch.no_grad():
        for module in prompts:
            tower, kind, block = module.source
            module.embedding.copy_(getattr(means[tower], kind)[block])
            module.look()


# ------------------------------------------------------------------ details
def _taker(taken: dict, place: tuple[int, str, int], tower: Tower):
    """A hook that keeps the class token, or the mean token, of a block's input or output."""

    def take(module: nn.Module, args: tuple, output: Tensor | tuple | None = None) -> None:
        x = args[0] if place[1] == "inputs" else output
        x = x[0] if isinstance(x, tuple) else x
        x = tower.blocks[place[2]].layout.features(x)
        taken[place] = (x[:, 0] if tower.class_token else x.flatten(1, -2).mean(1)).double()

    return take


def _grown(sums: Tensor, length: int) -> Tensor:
    """With rows of zeros up to a length."""
    missing = max(0, length - len(sums))
    return torch.cat([sums, sums.new_zeros(missing, *sums.shape[1:])]) if missing else sums


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """All inserted modules off, eval mode."""
    slots = [module for module in model.modules() if isinstance(module, Slots)]
    active, training = [each.active for each in slots], model.training
    model.eval()
    for each in slots:
        each.active = ()
    try:
        yield
    finally:
        for each, names in zip(slots, active, strict=True):
            each.active = names
        model.train(training)
