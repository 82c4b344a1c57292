"""Layers of the backbone that a method replaces with wrappers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Wrapping:
    """What `Method.wrap` returns: wrapper modules that take the place of layers while their adapter is active.

    method: name of the method. originals: path in the model -> the backbone's layer. layers: path -> its wrapper, which
    holds that very layer. The lifecycle puts wrappers and originals in place, nobody else; the model's parameters are
    renamed while an adapter with wrappers is active. Subclasses write `tensors`, `load`, `merge` and, where needed,
    `check_merge` and `enable`.
    """

    method: str
    originals: dict[str, nn.Module]
    layers: dict[str, nn.Module]

    def tensors(self) -> dict[str, Tensor]:
        """Name in files -> tensor to save. Names carry no adapter name; a shared tensor has one name."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, named as `tensors` names them, into the wrappers."""
        raise NotImplementedError

    def check_merge(self) -> None:
        """Raise NotImplementedError, and change nothing, where the wrappers cannot be folded into their originals."""

    def merge(self) -> None:
        """Fold the wrappers into their originals, for inference."""
        raise NotImplementedError

    def enable(self, enabled: bool) -> None:
        """Make the wrappers' parameters trainable, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad_(enabled)

    def modules(self) -> Iterator[nn.Module]:
        """The wrappers with their own submodules, without the layers they hold."""
        held = {id(module) for layer in self.originals.values() for module in layer.modules()}
        for layer in self.layers.values():
            yield from (module for module in layer.modules() if id(module) not in held)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The wrappers' own parameters; a shared one comes once."""
        seen: set[int] = set()
        for module in self.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    # ------------------------------------------------------------------ following the model to devices and dtypes
    def remember_place(self) -> None:
        """Note where each layer is; called whenever the wrappers leave the model."""
        self._places = {path: _place(layer) for path, layer in self.originals.items()}

    def follow(self) -> None:
        """Move and cast the wrappers of layers that were moved or cast since `remember_place`."""
        for path, layer in self.originals.items():
            if _place(layer) != self._places[path]:
                self.layers[path].to(*_place(layer))
        self.remember_place()


def _place(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(layer.parameters())
    return parameter.device, parameter.dtype
