"""KgCoOp (Yao et al., Visual-language prompt tuning with knowledge-guided context optimization, CVPR 2023,
arXiv 2303.13283)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.context import ComparedContext, classifier_of, first_words, text_owner


def template_texts(model: ZeroShotClassifier) -> Tensor:
    """Normalised features (C, D) of the frozen model: classes in the classifier's templates, averaged."""
    return F.normalize(model.frozen_texts().mean(1), dim=-1)


@register("kgcoop")
class KgCoOpConfig(Method):
    """CoOp's words, held near the texts that people write.

        text of class c = start, ctx_1 ... ctx_m, name of c, ".", end            ctx (m, d)
        loss            = cross-entropy + W (1 - mean over c of cos(text_c, template_c))

    template_c is the feature of c in the data set's template ("a photo of a {}, a type of pet."), the `templates` that
    the classifier was made with, from the model without adapters; of several templates their normalised mean. They are
    computed once and follow the classes.

    Published settings: init "a photo of a", W = 8, SGD 0.002, batch 128, 100 epochs. The official code has W = 1 where
    its script gives none. Parameters: m d, 2,048 for m = 4 and d = 512.
    """

    learning_rate: ClassVar = 2e-3

    num_words: int = setting(default=4, help="learned words m, where there is no init")
    init: str | None = setting(default="a photo of a", help="a text whose words are the first values; null draws them")
    weight: float = setting(default=8.0, help="factor W of the second term")

    def __post_init__(self):
        if self.num_words < 1:
            raise ValueError(f"num_words must be at least 1, got {self.num_words}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")

    def place(self, anatomy) -> Iterator[Placement]:
        owner, model, reading = text_owner(anatomy, "text.context", "KgCoOp", both_ways=True)
        words, template = first_words(model, reading, self.num_words, self.init)
        yield owner, "text.context", ComparedContext(words, template)

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        classifier = classifier_of(model, "KgCoOp")
        similar = (classifier.texts_of_step().float() * template_texts(classifier).float()).sum(-1)
        return {"distance": self.weight * (1 - similar.mean())}
