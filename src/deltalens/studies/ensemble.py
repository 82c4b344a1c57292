"""Several prompt sets of one backbone in one forward pass, and the mean of their predictions (VPT's paper, Fig. 15)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import Adapter, all_slots, state_of
from deltalens.lifecycle.switch import set_adapter
from deltalens.sites.output import logits_of
from deltalens.sites.slots import Slots

SLOTS = ("attention_prompts", "tokens_in")
NAME = "ensemble"


class OnePerPart(nn.Module):
    """Members for the parts of a batch: x (E * B, ...) is cut in E parts along its first axis, the e-th part goes
    through the e-th member with all further arguments, and what comes out is put together again.

    A member that gives (1, ...) for a part of B examples means the same for all of them. Tuples (keys and values) are
    put together entry by entry. The members stay where they are; this module does not own them.
    """

    pointwise = True

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = tuple(members)  # a tuple registers nothing

    def forward(self, x: Tensor, *further) -> Tensor | tuple[Tensor, ...]:
        parts = x.chunk(len(self.members))
        results = [member(part, *further) for member, part in zip(self.members, parts, strict=True)]
        if isinstance(results[0], tuple):
            return tuple(_joined(each, len(parts[0])) for each in zip(*results, strict=True))
        return _joined(results, len(parts[0]))


def _joined(results: Sequence[Tensor], batch: int) -> Tensor:
    whole = [each.expand(batch, *each.shape[1:]) for each in results]
    if len({each.shape[1:] for each in whole}) > 1:
        raise ValueError(
            f"prompt sets of one ensemble need the same number of prompts, got {[each.shape[-2] for each in whole]}"
        )
    return torch.cat(whole)


@contextlib.contextmanager
def all_prompt_sets(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context the model takes E copies of a batch, one after the other, for E adapters, and gives the logits
    of each adapter for its copy.

    The adapters may place modules in `attention.prompts` and `tokens.in` only (VPT: prepend, prefix, add), the same
    slots all of them, with as many prompts. Raises ValueError where they do not.
    """
    state = state_of(model)
    adapters = _fitting(model, names)
    before, paths = state.active, list(adapters[0].heads)
    for name in names:  # which moves and casts what was inactive
        set_adapter(model, name)
    heads = {path: model.get_submodule(path) for path in paths}
    try:
        for _, slots in all_slots(model):
            for slot in SLOTS:
                for members in zip(*(_modules(slots, slot, name) for name in names), strict=True):
                    slots.put(slot, NAME, "prompts", OnePerPart(members))
            slots.active = (NAME,)
        for path in paths:
            model.set_submodule(path, OnePerPart([adapter.heads[path] for adapter in adapters]))
        yield model
    finally:
        for path, head in heads.items():
            model.set_submodule(path, head)
        for _, slots in list(all_slots(model)):
            slots.remove(NAME)
        set_adapter(model, before)


@torch.no_grad()
def ensemble_logits(model: nn.Module, images: Tensor, names: Sequence[str]) -> Tensor:
    """Logits (E, B, classes) of every adapter for every image, in one forward pass of E * B images, in eval mode."""
    with all_prompt_sets(model.eval(), names):
        logits = logits_of(model(images.repeat(len(names), *[1] * (images.dim() - 1))))
    return logits.unflatten(0, (len(names), len(images)))


def ensemble_probabilities(model: nn.Module, images: Tensor, names: Sequence[str]) -> Tensor:
    """(B, classes): the mean over the adapters of their softmax probabilities."""
    return ensemble_logits(model, images, names).float().softmax(-1).mean(0)


# ------------------------------------------------------------------ details
def _fitting(model: nn.Module, names: Sequence[str]) -> list[Adapter]:
    """The adapters, checked to be prompt sets with heads of one shape."""
    state = state_of(model)
    unknown = [name for name in names if name not in state.adapters]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            f"an ensemble needs names of different adapters of the model ({', '.join(state.adapters)}), got "
            f"{', '.join(names) or 'none'}"
        )
    if NAME in state.adapters:
        raise ValueError(f"an adapter of the model is called {NAME!r}: load it under another name")
    adapters = [state.adapters[name] for name in names]
    places = []
    for name, adapter in zip(names, adapters, strict=True):
        placed = {(path, key.partition(".")[0]) for path, slots in all_slots(model) for key, _ in slots.of(name)}
        others = sorted({slot for _, slot in placed} - set(SLOTS))
        if others or adapter.parameters or adapter.wrappings or not placed:
            what = (
                f"modules in {', '.join(others)}" if others else "tensors of the backbone" if placed else "no prompts"
            )
            raise ValueError(
                f"adapter {name!r} has {what}: only adapters of prompts alone, such as VPT's, differ between the "
                "examples of a batch"
            )
        places.append(placed)
    if any(placed != places[0] for placed in places):
        raise ValueError(f"the adapters {', '.join(names)} have their prompts in different blocks or slots")
    if len({tuple(adapter.heads) for adapter in adapters}) > 1 or len({a.num_classes for a in adapters}) > 1:
        raise ValueError(f"the adapters {', '.join(names)} have heads for different numbers of classes")
    return adapters


def _modules(slots: Slots, slot: str, name: str) -> list[nn.Module]:
    return [module for key, module in slots.of(name) if key.partition(".")[0] == slot]
