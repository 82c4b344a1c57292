"""Turn an adapted model into the fastest plain model that computes the same."""

from __future__ import annotations

import torch
from torch import nn

from deltalens.lifecycle.state import KEY, ROOT, all_slots, state_of
from deltalens.sites.slots import ADAPTER_PREFIX, Slots
from deltalens.sites.swap import Swapped, original_class, swapped_class, unswap
from deltalens.sites.weights import LINEAR


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

    Weight changes (LoRA) are added to the weights and leave a plain model of the backbone's own classes. Modules with a
    `folded()` form (Mona) are replaced by it, prompts that serve as keys and values become constants; blocks with
    such modules keep
    their swapped class. Head and unfrozen tensors stay. The result cannot be switched, detached or trained further.
    """
    state = state_of(model)
    active = state.active
    model.eval()
    for owner, slots in list(all_slots(model)):
        module = model.get_submodule(owner)
        for name in [name for name in state.adapters if name not in active]:
            slots.remove(name)
        if LINEAR in type(module)._families:
            _merge_linear(module, slots)
        else:
            _fold_slots(module, slots, active)
    _unswap_idle(model)
    del model.__dict__[KEY]
    return model.requires_grad_(False)


def _merge_linear(layer: nn.Linear, slots: Slots) -> None:
    for part, rows in slots.rows.items():
        start, stop = rows or (0, layer.out_features)
        for module in slots.live(part):
            layer.weight[start:stop] += module.weight_change().to(layer.weight.dtype)
    del layer._modules["delta"]
    unswap(layer)


def _fold_slots(block: nn.Module, slots: Slots, active: tuple[str, ...]) -> None:
    family = next(family for family in type(block)._families if family.slots)
    for slot, adapters in slots.named_children():
        for name in active:
            if ADAPTER_PREFIX + name not in adapters:
                continue
            methods = adapters[ADAPTER_PREFIX + name]
            for key, module in list(methods.items()):
                if slot == "attention_prompts" and family.keys_values is not None:
                    tokens = module(next(block.parameters()))
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
