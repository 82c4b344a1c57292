"""Activation checkpointing of a backbone inside a dense network."""

from __future__ import annotations

from torch import nn


def set_grad_checkpointing(backbone: nn.Module, enable: bool = True) -> None:
    """Recompute the blocks of a backbone in backward, or keep what they computed again.

    `features_only` networks would recompute whole stages, and neither the first nor the last; where their stages have
    a switch of their own, that one is set, which recomputes block by block.
    """
    stages = [module for path, module in backbone.named_modules() if path and hasattr(module, "grad_checkpointing")]
    if stages:
        for stage in stages:
            stage.grad_checkpointing = enable
    elif hasattr(backbone, "set_grad_checkpointing"):
        backbone.set_grad_checkpointing(enable)
    else:
        raise TypeError(f"{type(backbone).__name__} has no activation checkpointing")
