"""A classifier whose classes are texts: CLIP's zero-shot classifier, and what few-shot methods adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.class_prompts import (
    TEMPLATE,
    ClassPrompts,
    Descriptions,
    Tokenizer,
    as_descriptions,
    class_prompts,
    described_prompts,
)
from deltalens.backbones.cosines import cosines
from deltalens.backbones.image_classifier import ImageClassifier
from deltalens.backbones.preprocessing import preprocessing_of, record
from deltalens.backbones.text_pass import Kept, TextPass, stamp
from deltalens.backbones.two_towers import two_towers_of
from deltalens.sites.anatomy import Anatomy, Family, Site
from deltalens.sites.layout import Words
from deltalens.sites.slots import Slots


class ZeroShotClassifier(nn.Module):
    """Images against class names, with an unmodified two-tower model (Radford et al., CLIP, ICML 2021).

        logits = exp(logit_scale) * normalize(image(x)) @ normalize(text(class))^T     (+ logit_bias in SigLIP)

    clip: a two-tower model of open_clip or transformers. tokenizer: texts -> token ids (n, L), padded as the model was
    trained; open_clip.get_tokenizer's is one. class_names: "_" is read as a space. templates: one text
    with {} where the name goes, or several, whose normalised features are averaged (prompt ensembling). descriptions:
    instead of templates, sentences about each class (CuPL, descriptors): class -> list of any length, or one list for
    each class in order; {} in them is the name. They are averaged alike. (Menon and Vondrick average cosines instead,
    which is the same but for the length of each class's mean.) An adapter with a template of its own (CoOp) uses that.

    width: D, of the space that both share.

    The result is an ordinary classifier: `model(images)` gives logits (B, C), every task, trainer and command takes it,
    and `deltalens.attach` adapts either tower, or both. Text features that nothing trains are computed once and kept;
    they are computed anew when a weight or the classes change (`backbones/text_pass.py` says what else is saved).

    Slots of the classifier, beside those of the towers' blocks (d: the text tower's width, D: of the shared space):

    * `text.context`: f(embedded words (P, L, d), prompts, normalised image features (B, D)) -> (P, L, d), or
      (B, P, L, d) from a module that says `reads_images = True`. A module may have a `template` of its own.
    * `text.embed`: f(x (n, L, d) with positions, layout) -> x; `layout.ends` are the texts' ends. A module that writes
      behind the end says how many words: `room = K`.
    * `text.pool`: f(x (n, L, d) behind the last block, layout) -> (n, d), or (n, K, d) where `pool` of the image tower
      reads K tokens, too: logits are then the mean over K pairs.
    * `text.output`: f(text features) -> text features, before they are normalised.
    * `output`: f(image features (B, D), images) -> image features, before they are normalised.
    * `logits`: f(logits (B, C), normalised image features (B, D)) -> logits.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        templates: str | Sequence[str] = TEMPLATE,
        descriptions: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    ):
        super().__init__()
        two_towers_of(clip)  # says what can be read
        self.clip = clip
        self.__dict__["tokenizer"] = tokenizer
        self.__dict__["kept"] = Kept()
        self.templates: tuple[str, ...] = ()
        self.descriptions: Descriptions | None = None
        self.set_classes(class_names, templates, descriptions)
        with torch.no_grad():
            self.width = self.text_features().shape[-1]

    def set_classes(
        self,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Other classes, and other templates or descriptions where these are given; adapters stay.

        Templates alone end the use of descriptions. A mapping of descriptions is kept whole, so that it serves other
        classes that it has. ValueError as in `class_prompts`, and for a class without sentences.
        """
        names = tuple(class_names)
        described = None if templates is not None else self.descriptions
        if descriptions is not None:
            described = as_descriptions(names, descriptions)
        templates = self.templates if templates is None else templates
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        self._write(names, templates, None)  # says what is wrong before anything changes
        if described is not None:
            self._write(names, templates, described)
        self.templates, self.descriptions = templates, described
        self.class_names, self.num_classes = names, len(names)
        self.kept.clear()

    # ------------------------------------------------------------------ forward
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        features = self.image_features(images)
        logits = self.similarities(features)
        for module in self.live("logits"):
            logits = module(logits, features)
        return logits

    def similarities(self, features: Tensor) -> Tensor:
        """Normalised image features (B, D) -> (B, C): scaled cosines with the classes, before the `logits` slot."""
        towers = two_towers_of(self.clip)
        similar = towers.scale(self.clip) * cosines(features, self.text_features(features))
        bias = towers.bias(self.clip)
        return similar if bias is None else similar + bias

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised features (B, D); (B, K, D) where a `pool` reads K tokens."""
        return F.normalize(self.raw_image_features(images), dim=-1)

    def raw_image_features(self, images: Tensor) -> Tensor:
        """The same before they are normalised."""
        features = two_towers_of(self.clip).image(self.clip, images)
        for module in self.live("output"):
            features = module(features, images)
        return features

    @torch.compiler.disable  # texts are kept between calls, and their lengths are data: the image side is compiled
    def text_features(self, image_features: Tensor | None = None) -> Tensor:
        """Normalised features of the classes (C, D); (B, C, D) where they depend on the images, (C, K, D) with K pairs.

        image_features: normalised, for contexts that read them.
        """
        self._check_classes()
        return self.features_of(self.prompts(), image_features)

    def features_of(self, prompts: ClassPrompts, image_features: Tensor | None = None) -> Tensor:
        """The same for other prompts: several templates of a class are averaged."""
        features = self._raw(prompts, image_features)
        if not prompts.single:  # a text's features are normalised, then averaged
            features = prompts.averaged(F.normalize(features, dim=-1), 1 if self._reads_images() else 0)
        for module in self.live("text.output"):
            features = module(features)
        return F.normalize(features, dim=-1)

    def _raw(self, prompts: ClassPrompts, image_features: Tensor | None) -> Tensor:
        towers = two_towers_of(self.clip)
        reading = towers.reading(self.clip)
        if reading is not None:
            return TextPass(self.clip, reading, self._slots(), self.layout, self.kept).features(prompts, image_features)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.clip.parameters()):
            return towers.text(self.clip, prompts.ids)

        def whole() -> Tensor:
            with torch.no_grad():
                return towers.text(self.clip, prompts.ids)

        return self.kept.get("features", (prompts, stamp([self.clip])), whole)

    @torch.no_grad()
    def image_classifier(self) -> ImageClassifier:
        """A plain image classifier that computes the same with the present weights and classes, in eval mode: a copy of
        the image tower with its adapters (merge first for a tower without), and one matrix for the classes. It
        compiles and exports without the texts.

        Raises TypeError where the texts depend on the image, as in CoCoOp: such classes are no matrix.
        """
        reading = next((m for m in self.live("text.context") if getattr(m, "reads_images", False)), None)
        if reading is not None:
            raise TypeError(
                f"{type(reading).__name__} writes the classes' texts anew for each image, so that there is no image "
                "classifier with constant classes: run the model itself"
            )
        towers, training = two_towers_of(self.clip), self.training
        self.eval()
        weight = towers.scale(self.clip) * self.text_features()
        self.train(training)
        bias, output, logits = towers.bias(self.clip), self.live("output"), self.live("logits")
        found = ImageClassifier(self.clip, weight, bias, output, logits, self.class_names)
        record(found, preprocessing_of(self))
        return found

    # ------------------------------------------------------------------ texts
    def prompts(self) -> ClassPrompts:
        """The classes' texts on the model's device, written as the active adapter wants them."""
        own = [module.template for module in self.live("text.context") if getattr(module, "template", None)]
        if own or self.descriptions is None:
            return self.prompts_with((own[-1],) if own else self.templates)
        device = next(self.clip.parameters()).device
        made_of = (self.class_names, self.descriptions, device)
        return self.kept.get(
            "prompts", made_of, lambda: self._write(self.class_names, (), self.descriptions).to(device)
        )

    def prompts_with(self, templates: Sequence[str]) -> ClassPrompts:
        """The classes in other templates, on the model's device."""
        templates = tuple(templates)
        device = next(self.clip.parameters()).device
        made_of = (self.class_names, templates, device)
        return self.kept.get(
            f"prompts {templates}", made_of, lambda: self._write(self.class_names, templates, None).to(device)
        )

    def _write(
        self, names: tuple[str, ...], templates: tuple[str, ...], descriptions: Descriptions | None
    ) -> ClassPrompts:
        reading = two_towers_of(self.clip).reading(self.clip)
        ends = (lambda ids: reading.ends(self.clip, ids)) if reading else (lambda ids: ids.argmax(-1))
        if descriptions is not None:
            return described_prompts(names, descriptions, self.tokenizer, ends)
        return class_prompts(names, templates, self.tokenizer, ends)

    # ------------------------------------------------------------------ adapters
    def _slots(self) -> Slots | None:
        return self._modules.get("delta")

    def live(self, slot: str) -> list[nn.Module]:
        """The active modules of a slot of the classifier."""
        slots = self._slots()
        return [] if slots is None else slots.live(slot)

    def _check_classes(self) -> None:
        """Modules that belong to the classes they were made for say so: `check_classes(names)` raises for others."""
        slots = self._slots()
        for module in () if slots is None else slots.all_live():
            if hasattr(module, "check_classes"):
                module.check_classes(self.class_names)

    @property
    def layout(self) -> Words:
        """The text tower's layout."""
        return self.__dict__.get("delta_layout") or Words()

    def _reads_images(self) -> bool:
        return any(getattr(module, "reads_images", False) for module in self.live("text.context"))

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """nn.Module.train; what was kept is forgotten."""
        self.kept.clear()
        return super().train(mode)


SLOTS = frozenset({"text.context", "text.embed", "text.pool", "text.output", "output", "logits"})
CLASSIFIER = Family(
    name="deltalens.backbones.zero_shot:CLASSIFIER",
    methods={},
    slots=SLOTS,
    widths=lambda model: dict.fromkeys(("text.output", "output", "logits"), model.width),
)


def claim(model: nn.Module, anatomy: Anatomy) -> None:
    """Where the model is such a classifier, give its slots to the towers: those of texts to the text tower's owner,
    those of images and logits to the image tower."""
    if not isinstance(model, ZeroShotClassifier):
        return
    for tower in anatomy.towers:
        width = tower.blocks[0].width
        if isinstance(tower.layout, Words):
            tower.owner = Site("", model, CLASSIFIER, width, tower=tower)
        else:
            tower.classifier = Site("", model, CLASSIFIER, width, tower=tower)
