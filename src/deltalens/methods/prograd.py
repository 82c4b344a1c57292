"""ProGrad (Zhu et al., Prompt-aligned gradient for prompt tuning, ICCV 2023, arXiv 2205.14865)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltalens.methods.base import register, setting
from deltalens.methods.context import ComparedContext, classifier_of
from deltalens.methods.coop import CoOpConfig
from deltalens.sites.output import logits_of

PRIOR = "zero_shot"


@register("prograd")
class ProGradConfig(CoOpConfig):
    """CoOp's words, whose gradient never goes against what the zero-shot model says.

        L_kl = mean over images of KL( softmax(zero-shot logits) || softmax(logits) )        temperature 1
        g    = g_ce                                                where <g_ce, g_kl> >= 0, for each tensor
               g_ce - strength <g_ce, u> u,  u = g_kl / |g_kl|     elsewhere

    The zero-shot logits are those of the model without adapters, in the templates that the classifier was made with.
    g_ce is the gradient of all loss terms but L_kl. L_kl is in the task's "loss", but its gradient takes part in the
    rule only: a loop of your own calls `deltalens.tasks.backward(task, result)` in the place of `loss.backward()`,
    `deltalens.training.fit` does it by itself. Each step has two backward passes. One device, whole batches: gradients
    are not accumulated.

    Published settings: strength 1, otherwise as CoOp: m = 16 or 4 words, SGD 0.002, batch 32. Parameters: m d.
    """

    learning_rate: ClassVar = 2e-3
    context: ClassVar = ComparedContext

    strength: float = setting(default=1.0, help="share of the opposing part that is taken away")

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        zero_shot = classifier_of(model, "ProGrad").zero_shot_logits(batch[0]).float().log_softmax(-1)
        found = logits_of(output).float().log_softmax(-1)
        return {PRIOR: (zero_shot.exp() * (zero_shot - found)).sum(-1).mean()}

    def combine(self, gradients: dict[str, list[Tensor]]) -> list[Tensor]:
        prior = gradients[f"{self.name}.{PRIOR}"]
        others = [terms for name, terms in gradients.items() if terms is not prior]
        return [self._aligned(sum(terms), against) for *terms, against in zip(*others, prior, strict=True)]

    def _aligned(self, gradient: Tensor, prior: Tensor) -> Tensor:
        """What is not finite stays so, for loss scaling to see it."""
        direction = prior / prior.norm().clamp_min(torch.finfo(prior.dtype).tiny)
        along = (gradient * direction).sum()
        return torch.where(along >= 0, gradient, gradient - self.strength * along * direction)
