"""peft's tuner layers around layers of our backbones: made, saved, loaded and merged by peft's own functions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltalens.methods.wrapping import Wrapping

if TYPE_CHECKING:
    from peft import PeftConfig

PREFIX, SHARED_PREFIX = "base_model.model.", "base_model."


class PeftLayers(Wrapping):
    """Tuner layers of one adapter, in the order of the model.

    peft does not see the model but a bare tree that holds the targeted layers under their names in the plain
    classifier; it wraps them there as it would in the model, draws the same random numbers, and keeps what is shared
    between layers (the projections of VeRA). So nothing but the targets is touched, and each adapter has wrappers of
    its own. Inside peft's layers every adapter is called `default`.
    """

    def __init__(self, method: str, targets: dict[str, tuple[str, nn.Linear]], config: PeftConfig):
        """targets: name in the plain classifier -> (path in the model, layer)."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.method = method
        self.originals = dict(targets.values())
        self.model = _inject(method, {name: layer for name, (_, layer) in targets.items()}, config)
        tree = self.model.get_base_model()
        self.layers = {path: tree.get_submodule(name) for name, (path, _) in targets.items()}
        for path, layer in self.layers.items():
            if not isinstance(layer, BaseTunerLayer) or layer.get_base_layer() is not self.originals[path]:
                raise ValueError(f"{method} has not wrapped {path}; its settings leave that layer out")
        self._trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.remember_place()

    def enable(self, enabled: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(enabled)
        trained = {id(parameter) for parameter in self._trained} if enabled else set()
        for parameter in self.parameters():  # what a tuner keeps frozen must not thaw
            parameter.requires_grad_(id(parameter) in trained)

    def tensors(self) -> dict[str, Tensor]:
        return {self._file_name(key): tensor for key, tensor in self._state().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        state = {key: tensors[self._file_name(key)] for key in self._state(aliases=True)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(self.model, state)
        if result.unexpected_keys:
            raise ValueError(f"{self.method} has no place for {', '.join(result.unexpected_keys[:4])}")

    def check_merge(self) -> None:
        layer = next(iter(self.layers.values()))
        try:
            copy.deepcopy(layer).merge()
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise NotImplementedError(
                f"peft cannot merge {self.method} into the weights ({error}): use the model with its adapter"
            ) from error

    def merge(self) -> None:
        for layer in self.layers.values():
            layer.merge()

    # ------------------------------------------------------------------ names
    def _state(self, aliases: bool = False) -> dict[str, Tensor]:
        """peft's key -> tensor, not copied. A tensor that peft lists under several keys comes under its first one;
        with `aliases` under all."""
        from peft import get_peft_model_state_dict

        everything = self.model.state_dict(keep_vars=True)
        state = get_peft_model_state_dict(self.model, everything, save_embedding_layers=False)
        self._first: dict[str, str] = {}
        first_of: dict[int, str] = {}
        for key, tensor in state.items():
            self._first[key] = first_of.setdefault(id(tensor), key)
        return state if aliases else {key: tensor for key, tensor in state.items() if self._first[key] == key}

    def _file_name(self, key: str) -> str:
        return self._first[key].removeprefix(PREFIX).removeprefix(SHARED_PREFIX)


def _inject(method: str, layers: dict[str, nn.Linear], config: PeftConfig):
    """A PeftModel of a tree of these layers. The layers keep their values and flags, or it is an error."""
    from peft import get_peft_model

    tree = _tree(layers)
    parameters = list(tree.parameters())
    flags, values = [p.requires_grad for p in parameters], [p.detach().clone() for p in parameters]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(tree, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"peft cannot apply {method} to these layers: {error}") from error
    finally:
        changed = False
        for parameter, flag, value in zip(parameters, flags, values, strict=True):
            parameter.requires_grad_(flag)
            if not parameter.is_meta and not torch.equal(parameter.detach(), value):
                changed, parameter.data = True, value
    if changed:
        raise ValueError(
            f"{method} with these settings changes the frozen weights when it starts (as the initialisations pissa and "
            "olora do); an adapter must leave the backbone as it is: choose another initialisation"
        )
    return model


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Bare modules with the given layers at the given paths."""
    root = nn.Module()
    for path, layer in layers.items():
        parent, *steps = root, *path.split(".")
        for step in steps[:-1]:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent._modules[step]
        parent.add_module(steps[-1], layer)
    return root
