"""LASP (Bulat and Tzimiropoulos, Language-aware soft prompting, CVPR 2023, arXiv 2210.01115)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.class_prompts import IMAGENET_SELECT
from deltalens.backbones.two_towers import two_towers_of
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods.base import Method, Placement, register, setting
from deltalens.methods.context import ComparedContext, classifier_of, first_words, text_owner
from deltalens.sites.anatomy import Anatomy, require
from deltalens.sites.norms import is_norm

# the published list; one of them stands there twice, and counts twice
TEMPLATES = (
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "{} texture.",
    *IMAGENET_SELECT,
    "a photo of a {}.",
    "a photo of many {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a pixelated photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a close-up photo of the {}.",
    "a low resolution photo of a {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
)


class TextShift(nn.Module):
    """`text.output`: one vector (1, D) that is added to the feature of every text, zero at first."""

    def __init__(self, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.w.to(features.dtype)


def _with_noise(features: Tensor, length: float, probability: float) -> Tensor:
    if length and torch.rand(()).item() < probability:
        return features + length * torch.randn_like(features)
    return features


@register("lasp")
class LASPConfig(Method):
    """CoOp's words, which have to be told apart by texts that people write, and the image tower's norms.

        text_c  = normalize( text(start, ctx_1 ... ctx_m, name of c, ".", end) + w )        ctx (m, d), w (1, D)
        u_tc    = normalize( text(template t with the name of c) ) + noise * N(0, 1) in a part of the steps
        loss    = cross-entropy + weight * mean over t, c of
                  -log softmax over k of ( exp(logit_scale) <text_k, u_tc> ) at k = c

    u_tc is of the frozen model and not normalised again behind the noise; the softmax is over the classes k of the
    learned words, as the official code has it, not over those of the templates. Weight and bias of the norms in the
    image tower's blocks are trained at a tenth of the rate.

    virtual_classes are names without images that take part in the second term (LASP-V). Off by default. Warning: the
    official code puts the names of all classes of a data set there, those of the novel classes too, so that published
    base-to-novel numbers may have seen the novel names in training. With its INCLUDE_ALL_CLASSES they are columns of
    the cross-entropy as well, which is not offered here.

    Published settings: init "a photo of a", 35 templates, weight 5 (10 with 50 epochs), SGD 0.032, batch 32, 25, 50 or
    300 epochs by data set, gradients clipped at 1. Parameters: m d + D + 4 C for each image block, 39,424 on ViT-B/16.
    """

    learning_rate: ClassVar = 2e-3

    num_words: int = setting(default=4, help="learned words m, where there is no init")
    init: str | None = setting(default="a photo of a", help="a text whose words are the first values; null draws them")
    templates: tuple[str, ...] = setting(default=TEMPLATES, help="texts with {} that the words are compared with")
    weight: float = setting(default=5.0, help="factor of the term over texts")
    noise: float = setting(default=0.05, help="standard deviation of noise on the templates' features; 0 for none")
    noise_probability: float = setting(default=0.5, help="share of steps with noise")
    correction: bool = setting(default=True, help="learn the vector w")
    norms: bool = setting(default=True, help="train the norms of the image tower's blocks")
    norms_rate: float = setting(default=0.1, help="factor on the learning rate of these norms")
    virtual_classes: tuple[str, ...] = setting(default=(), help="names without images in the term over texts (LASP-V)")

    def __post_init__(self):
        if self.num_words < 1:
            raise ValueError(f"num_words must be at least 1, got {self.num_words}")
        if not self.templates:
            raise ValueError("LASP compares its words with texts of templates: give at least one")
        if self.weight < 0 or self.noise < 0 or not 0 <= self.noise_probability <= 1:
            raise ValueError("weight and noise must not be negative, and noise_probability must be in [0, 1]")

    def place(self, anatomy) -> Iterator[Placement]:
        owner, model, reading = text_owner(anatomy, "text.context", "LASP", both_ways=True)
        words, template = first_words(model, reading, self.num_words, self.init)
        yield owner, "text.context", ComparedContext(words, template)
        if self.correction:
            require(owner, "text.output", "LASP", model)
            yield owner, "text.output", TextShift(model.width)

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        if not self.norms:
            return []
        blocks = tuple(f"{block.path}." for tower in anatomy.towers if tower.name == "vision" for block in tower.blocks)
        return [
            path
            for path, _ in anatomy.backbone_parameters()
            if path.startswith(blocks) and is_norm(anatomy.model.get_submodule(path.rpartition(".")[0]))
        ]

    def unfreeze_multiplier(self) -> float:
        return self.norms_rate

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        classifier = classifier_of(model, "LASP")
        virtual = tuple(name for name in self.virtual_classes if name not in classifier.class_names)
        learned = classifier.texts_of_step()
        if virtual:
            learned = torch.cat([learned, classifier.features_of(_learned_prompts(classifier, virtual))])
        fixed = classifier.frozen_texts(classifier.prompts_with(self.templates, (*classifier.class_names, *virtual)))
        fixed = _with_noise(fixed.float(), self.noise, self.noise_probability).transpose(0, 1)  # (T, C, D)
        scale = two_towers_of(classifier.clip).scale(classifier.clip).float()
        logits = scale * torch.einsum("kd,tcd->tck", learned.float(), fixed)
        labels = torch.arange(len(learned), device=logits.device).expand(len(fixed), -1)
        return {"texts": self.weight * F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def _learned_prompts(classifier: ZeroShotClassifier, names: tuple[str, ...]):
    return classifier.prompts_with(classifier.prompts().templates, names)
