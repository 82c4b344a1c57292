"""The classifier as it is (Radford et al., CLIP, ICML 2021): the row that others are compared with."""

from __future__ import annotations

from torch import Tensor, nn

from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods.base import Method, register
from deltalens.sites.anatomy import Anatomy


class AsItIs(nn.Module):
    """`logits`: as they are. training_free: no epochs are run for it."""

    training_free = True

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        return logits


@register("zero_shot")
class ZeroShotConfig(Method):
    """CLIP without training: images against the classes' texts.

        logits = exp(logit_scale) normalize(image(x)) @ normalize(text(class))^T

    An adapter of it is empty; its file names backbone, classes and templates, so that `evaluate`, `predict` and studies
    take it as any other. Papers use a template for each dataset (`deltalens.data.prompts.TEMPLATES`), several, or
    sentences, which belong to the classifier: see `deltalens.ZeroShotClassifier`. Parameters: none.
    """

    def place(self, anatomy: Anatomy):
        site = next((tower.classifier for tower in anatomy.towers if tower.classifier is not None), None)
        if site is None or not isinstance(anatomy.model, ZeroShotClassifier):
            raise TypeError(
                f"zero-shot needs a classifier made of class names, which {type(anatomy.model).__name__} is not: build "
                "it with create_backbone('open_clip/...', class_names=[...])"
            )
        yield site, "logits", AsItIs()
