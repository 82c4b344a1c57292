"""Turn an adapted model into the fastest plain model that computes the same."""

from __future__ import annotations

import torch
from torch import nn

from deltalens.lifecycle.state import KEY, ROOT, all_slots, state_of
from deltalens.lifecycle.wrapped import merge_wrapped
from deltalens.sites.slots import ADAPTER_PREFIX, Slots
from deltalens.sites.swap import Swapped, original_class, swapped_class, unswap
from deltalens.sites.weights import LAYER, WeightSlots, merge_changes


class ConstantKeysValues(nn.Module):
    """Prompts of a merged model: the keys and values that they become, which no longer depend on anything."""

    pointwise = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Fold the active adapters into the model for inference, in place, and forget all others. Returns the model, in
    eval mode.

    Weight changes (LoRA, FacT) and changes of outputs (SSF) become weights and biases, affine modules in front of
    linear layers (RepAdapter) become part of those layers; what is left is a plain model of the backbone's own classes.
    A layer without a bias may get one. Modules with a `folded()` form (Mona) are replaced by it, prompts that serve as
    keys and values become constants; blocks with such modules keep their swapped class. Head and unfrozen tensors
    stay. The result cannot be switched, detached or trained further.
    """
    state = state_of(model)
    active = state.active
    merge_wrapped(model)
    model.eval()
    owners = [(model.get_submodule(path), slots) for path, slots in all_slots(model)]
    for _, slots in owners:
        for name in [name for name in state.adapters if name not in active]:
            slots.remove(name)
    layers = [(module, slots) for module, slots in owners if isinstance(slots, WeightSlots)]
    blocks = [(module, slots) for module, slots in owners if not isinstance(slots, WeightSlots)]
    for layer, _ in layers:  # first, because prompts are projected by these layers
        merge_changes(layer)
        del layer._modules["delta"]
        unswap(layer, LAYER)
    for block, slots in blocks:
        _fold_slots(block, slots, active)
    for block, slots in blocks:
        _fold_into_readers(block, slots)
    _unswap_idle(model)
    del model.__dict__[KEY]
    return model.requires_grad_(False)


def _fold_into_readers(block: nn.Module, slots: Slots) -> None:
    """Fold the modules at the end of a `pre` slot that are affine in n, n -> M n + c, into the layers that read n.

    Prompts are projected by attention's layers and do not pass `attention.pre`: where some are left, its modules stay.
    """
    family = next((family for family in type(block)._families if family.slots), None)
    prompted = any(not isinstance(module, ConstantKeysValues) for module in slots.live("attention.prompts"))
    for slot, paths in family.readers(block).items() if family else ():
        if slot == "attention.pre" and prompted:
            continue
        readers = [layer for path in paths if (layer := _layer_at(block, path)) is not None]
        if not readers or any(original_class(layer) is not nn.Linear for layer in readers):
            continue
        while (modules := slots.live(slot)) and hasattr(modules[-1], "affine"):
            precise = torch.promote_types(readers[0].weight.dtype, torch.float32)  # M is near 1
            matrix, shift = modules[-1].to(precise).affine()
            for layer in readers:
                weight = layer.weight.to(precise)
                bias = weight @ shift if layer.bias is None else layer.bias + weight @ shift
                layer.weight.copy_(weight @ matrix)
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
            slots.remove_last(slot)


def _layer_at(block: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


def _fold_slots(block: nn.Module, slots: Slots, active: tuple[str, ...]) -> None:
    family = next(family for family in type(block)._families if family.slots)
    for slot, adapters in slots.named_children():
        for name in active:
            if ADAPTER_PREFIX + name not in adapters:
                continue
            methods = adapters[ADAPTER_PREFIX + name]
            for key, module in list(methods.items()):
                if slot == "attention_prompts" and getattr(module, "constant", False):
                    tokens = module(next(block.parameters()).new_zeros(1, 1, family.width(block)))
                    keys, values = tokens if isinstance(tokens, tuple) else family.keys_values(block, tokens)
                    methods[key] = ConstantKeysValues(keys.clone(), values.clone())
                elif hasattr(module, "folded"):
                    methods[key] = module.folded()


def _unswap_idle(model: nn.Module) -> None:
    """Give every module that no adapter module needs any more its own class back."""
    busy = [owner for owner, slots in all_slots(model) if slots.all_live()]
    if not busy:
        for owner, _ in list(all_slots(model)):
            del model.get_submodule(owner)._modules["delta"]
        for module in model.modules():
            unswap(module)
            module.__dict__.pop("delta_layout", None)
        return
    if isinstance(model, Swapped):
        families = tuple(family for family in type(model)._families if family is not ROOT)
        model.__class__ = swapped_class(original_class(model), families) if families else original_class(model)
