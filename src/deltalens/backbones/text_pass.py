"""Class features of a text tower with its slots, and what of it need not be computed.

    e = tokens(ids)                    text.context: f(e (P, L, d), prompts, image features) -> e, or (B, P, L, d)
    x = e + positions                  text.embed: f(x, layout) -> x
    x = block_1 ... block_n(x)         the blocks' own slots
    f = finish(x at the texts' ends)   text.pool: f(x, layout) -> rows (P, d) or (P, K, d)

Exact shortcuts, taken wherever they are exact:

* in causal towers words behind the last end are cut off;
* what lies below the first block that an adapter or training touches is computed once and kept;
* the last block computes only the row that is read, where everything in it acts on each word alone;
* features that nothing trained touches are computed once; without gradients, all features are.

What is kept is computed anew when a weight, the classes, the device or the precision changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.backbones.class_prompts import ClassPrompts
from deltalens.backbones.multihead import may_keep_class_row_only
from deltalens.backbones.two_towers import TextReading
from deltalens.sites.layout import Words
from deltalens.sites.slots import Slots

CHUNK = 256  # texts at a time where no graph is needed


class Kept:
    """What was computed before, each with what it was computed from. Copies and pickles begin empty."""

    def __init__(self):
        self.values: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, made_of: Any, compute: Callable[[], Any]) -> Any:
        """The value of that name; computed where it is not there, or was made of something else."""
        if torch.compiler.is_compiling():
            return compute()
        found = self.values.get(name)
        if found is None or found[0] != made_of:
            found = self.values[name] = (made_of, compute())
        return found[1]

    def clear(self) -> None:
        self.values.clear()

    def __deepcopy__(self, memo):
        return Kept()

    def __reduce__(self):
        return Kept, ()


def stamp(parts: list[nn.Module | nn.Parameter]) -> tuple:
    """What changes when a parameter of these is changed in place, moved, or replaced."""
    found = [p for part in parts for p in _parameters(part)]
    return tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in found)


def precision_of(like: Tensor) -> tuple:
    """Where and how finely a pass computes: device, dtype, autocast."""
    kind = like.device.type
    return like.device, like.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class TextPass:
    """The way through a text tower.

    slots: of the classifier around the two-tower model, None without adapters. layout: the text tower's; the ends are
    recorded there. kept: where the results of earlier passes are.
    """

    def __init__(self, model: nn.Module, reading: TextReading, slots: Slots | None, layout: Words, kept: Kept):
        self.model, self.reading, self.slots, self.layout, self.kept = model, reading, slots, layout, kept
        self.blocks = list(reading.blocks(model))
        self.added = [module for slot in ("context", "embed", "pool") for module in self.live(f"text.{slot}")]

    def live(self, slot: str) -> list[nn.Module]:
        return [] if self.slots is None else self.slots.live(slot)

    def features(self, prompts: ClassPrompts, image_features: Tensor | None = None) -> Tensor:
        """(P, D), not normalised; (B, P, D) where a context depends on the images; (P, K, D) where K words are read."""
        parts = [*self.reading.parts(self.model), *self.added]
        trained = torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in _parameters(part))
        if trained or any(getattr(module, "reads_images", False) for module in self.added):
            return self._run(prompts, slice(None), image_features)
        made_of = (prompts, stamp(parts), self._conditions())
        return self.kept.get("features", made_of, lambda: self._in_chunks(prompts))

    def _in_chunks(self, prompts: ClassPrompts) -> Tensor:
        with torch.no_grad():
            chunk = len(prompts.ids) if self.live("text.context") else CHUNK  # a context reads all classes' texts
            starts = range(0, len(prompts.ids), chunk)
            return torch.cat([self._run(prompts, slice(start, start + chunk), None) for start in starts])

    def _conditions(self) -> tuple:
        """What else the numbers depend on."""
        slots = [self.slots, *(block._modules.get("delta") for block in self.blocks)]
        precision = precision_of(self.reading.positions(self.model))
        return precision, tuple(each.active for each in slots if each is not None)

    # ------------------------------------------------------------------ one pass
    def _run(self, prompts: ClassPrompts, which: slice, image_features: Tensor | None) -> Tensor:
        ids, ends = prompts.ids[which], prompts.ends[which]
        length = self._length(ids, ends)
        ids, first = ids[:, :length], 0
        mask = self.reading.mask(self.model, length)
        if self.live("text.context") or self.live("text.embed"):
            x, lead = self._context(ids, prompts, image_features)
        else:
            first = self._untouched()
            below = self._below(first)
            made_of = (prompts, which.start, length, first, stamp(below), self._conditions())
            trained = any(p.requires_grad for part in below for p in _parameters(part))
            x = (
                self._start(ids, first, mask)
                if trained
                else self.kept.get("below", made_of, lambda: self._start(ids, first, mask))
            )
            lead = x.shape[:1]
        self.layout.ends = ends if x.shape[0] == len(ends) else ends.repeat(x.shape[0] // len(ends))
        x = self.slots.tokens("text.embed", x, self.layout) if self.slots is not None else x
        rows = self._blocks(x, first, mask)
        features = self.reading.finish(self.model, rows)
        return features if len(lead) == 1 else features.unflatten(0, lead)

    def _length(self, ids: Tensor, ends: Tensor) -> int:
        """Words that anybody reads: up to the last end, and what adapters put behind it."""
        if not self.reading.causal(self.model):
            return ids.shape[1]
        room = max((getattr(module, "room", 0) for module in self.added), default=0)
        return min(int(ends.max()) + 1 + room, ids.shape[1])

    def _embed(self, ids: Tensor) -> Tensor:
        return self.reading.tokens(self.model)(ids).to(next(self.blocks[0].parameters()).dtype)

    def _place(self, x: Tensor) -> Tensor:
        return x + self.reading.positions(self.model)[: x.shape[1]].to(x.dtype)

    def _context(self, ids: Tensor, prompts: ClassPrompts, image_features: Tensor | None) -> tuple[Tensor, torch.Size]:
        """Embedded words (n, L, d) with their positions, and the shape (P,) or (B, P) that n stands for."""
        x = self._embed(ids)
        for module in self.live("text.context"):
            x = module(x, prompts, image_features)
        return self._place(x.flatten(0, -3)), x.shape[:-2]

    def _below(self, first: int) -> list[nn.Module | nn.Parameter]:
        return [self.reading.tokens(self.model), self.reading.positions(self.model), *self.blocks[:first]]

    def _start(self, ids: Tensor, first: int, mask: Tensor | None) -> Tensor:
        """What enters the first block that is touched."""
        x = self._place(self._embed(ids))
        for block in self.blocks[:first]:
            x = self.reading.run(self.model, block, x, mask, None)
        return x

    def _untouched(self) -> int:
        """How many blocks from the first on nothing touches: no active adapter, no training, no dropout."""
        if any(p.requires_grad for part in self._below(0) for p in _parameters(part)):
            return 0
        for index, block in enumerate(self.blocks):
            slots = block._modules.get("delta")
            if (
                any(p.requires_grad for p in block.parameters())
                or any(module.training for module in block.modules())
                or (slots is not None and slots.all_live())
                or block._forward_hooks
                or block._forward_pre_hooks
            ):
                return index
        return len(self.blocks)

    def _blocks(self, x: Tensor, first: int, mask: Tensor | None) -> Tensor:
        """From the first touched block to the rows that are read."""
        pools = self.live("text.pool")
        *rest, last = self.blocks[first:] or [None]
        for block in rest:
            x = self.reading.run(self.model, block, x, mask, None)
        ends = self.layout.ends
        if last is not None:
            one_row = not pools and self.reading.takes_rows(last) and may_keep_class_row_only(last.delta)
            x = self.reading.run(self.model, last, x, mask, ends if one_row else None)
            if one_row:
                return x[:, 0]
        if pools:
            return pools[-1](x, self.layout)
        return x[torch.arange(len(x), device=x.device), ends]


def _parameters(part: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else part.parameters()
