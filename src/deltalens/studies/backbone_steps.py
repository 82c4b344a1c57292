"""Training steps of a network around a backbone, with the backbone's own share of the time and of the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.studies.measure import CLOCKS, Clock, Timings, saved_bytes


class BackboneStep:
    """Forward and backward of a loss, cut where the backbone's maps leave it.

    The maps go on as copies without history. Backward first runs from the loss to these copies, then from the
    backbone's own maps with the gradients found there: the same gradients as in one pass, and the time of everything
    outside the backbone (norms, neck, decoder, losses) can be told from its own.

    model: holds the backbone at the path `backbone`, which returns a tensor or a sequence of tensors. loss: runs the
    model and returns a scalar. seconds: of the backbone, forward and backward, of every call so far.
    """

    def __init__(self, model: nn.Module, backbone: str, loss: Callable[[], Tensor], device: str, clock: Clock):
        self.model, self.backbone, self.loss = model, model.get_submodule(backbone), loss
        self.device, self.read = torch.device(device), CLOCKS[clock]
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """One step. Gradients are added to those that are there."""
        maps: list[Tensor] = []
        leaves: list[Tensor] = []
        start, forward = 0.0, 0.0

        def before(*_: Any) -> None:
            nonlocal start
            start = self._now()

        def after(_module: nn.Module, _inputs: Any, output: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
            nonlocal forward
            forward = self._now() - start
            maps.extend([output] if isinstance(output, Tensor) else output)
            leaves.extend(each.detach().requires_grad_(each.requires_grad) for each in maps)
            return leaves[0] if isinstance(output, Tensor) else list(leaves)

        hooks = [self.backbone.register_forward_pre_hook(before), self.backbone.register_forward_hook(after)]
        try:
            torch.autograd.backward(self.loss())
        finally:
            for hook in hooks:
                hook.remove()
        reached = [(own, leaf.grad) for own, leaf in zip(maps, leaves, strict=True) if leaf.grad is not None]
        start = self._now()
        if reached:
            torch.autograd.backward([own for own, _ in reached], [gradient for _, gradient in reached])
        self.seconds.append(forward + self._now() - start)

    def saved_bytes(self) -> int:
        """What the backbone's forward keeps for backward, on the images that the loss gives it."""
        inputs: list[tuple[Any, ...]] = []
        hook = self.backbone.register_forward_pre_hook(lambda _module, given: inputs.append(given))
        try:
            with torch.no_grad():
                self.loss()
        finally:
            hook.remove()
        return saved_bytes(lambda: self.backbone(*inputs[-1]), [*self.model.parameters(), *self.model.buffers()])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()


def backbone_timings(steps: dict[str, BackboneStep], rounds: int) -> Timings:
    """Of the backbones alone, in the last `rounds` calls of every step."""
    return Timings({name: step.seconds[-rounds:] for name, step in steps.items()})
