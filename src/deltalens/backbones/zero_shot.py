"""A classifier whose classes are texts: CLIP's zero-shot classifier, and what few-shot methods adapt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

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
    whole_texts,
)
from deltalens.backbones.cosines import cosines
from deltalens.backbones.image_classifier import ImageClassifier
from deltalens.backbones.preprocessing import preprocessing_of, record
from deltalens.backbones.text_pass import Kept, TextPass, precision_of, stamp
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

      A module of `text.context` or `text.output` whose method reads features in its `losses` says
      `features_in_losses = True`: `texts_of_step()` and `zero_shot_logits()` then find those of the forward before.
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
        self.width = self._shared_width()

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

    def _shared_width(self) -> int:
        """Of a tower that is known inside, without a pass, so that models on the meta device are read, too."""
        reading = two_towers_of(self.clip).reading(self.clip)
        with torch.no_grad():
            if reading is None:
                return self.text_features().shape[-1]
            return reading.finish(self.clip, reading.positions(self.clip)[:1]).shape[-1]

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
        texts = self.text_features(features)
        if self.training and self._features_in_losses() and not torch.compiler.is_compiling():
            self.kept.values |= {STEP_IMAGES: (None, features), STEP_TEXTS: (None, texts)}
        towers = two_towers_of(self.clip)
        similar = towers.scale(self.clip) * cosines(features, texts)
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

    def text_features_of(self, texts: Sequence[str]) -> Tensor:
        """Normalised features (n, D) of whole texts, such as the queries of a search; (n, K, D) with K pairs.

        A text stands as it is, without a template. An adapter with learned words in the place of a template (CoOp)
        writes them before it: "a red car" is then the query, not "a photo of a red car".

        ValueError for repeated, empty and too long texts, and for an adapter with words of its own for each class;
        TypeError for one whose texts depend on the images (CoCoOp).
        """
        contexts = self.live("text.context")
        reading = next((module for module in contexts if getattr(module, "reads_images", False)), None)
        if reading is not None:
            raise TypeError(
                f"{type(reading).__name__} writes a text anew for each image, so that a text has no features of its own"
            )
        for module in contexts:
            if hasattr(module, "check_classes"):
                module.check_classes(tuple(texts))
        own = [module.template for module in contexts if getattr(module, "template", None)]
        if own:
            return self.features_of(self.prompts_with(own[-1:], texts))
        device = next(self.clip.parameters()).device
        return self.features_of(whole_texts(texts, self.tokenizer, self._ends).to(device))

    def texts_of_step(self) -> Tensor:
        """The text features that the last forward in training used, handed out once; else computed anew. For losses
        of modules that say `features_in_losses = True`, so that texts are run once in a step."""
        found = self.kept.values.pop(STEP_TEXTS, None)
        return self.text_features() if found is None else found[1]

    def frozen_texts(self, prompts: ClassPrompts | None = None) -> Tensor:
        """Normalised features (C, T, D) of the classes in T templates without any adapter, computed once and kept.

        prompts: others than those of the classifier's own templates. Raises TypeError where the text tower itself is
        trained: what it was before is not at hand.
        """
        prompts = self.prompts_with(self.templates) if prompts is None else prompts
        towers = two_towers_of(self.clip)
        reading = towers.reading(self.clip)
        parts = [self.clip] if reading is None else reading.parts(self.clip)
        frozen = [p for part in parts for p in _own_parameters(part)]
        if any(p.requires_grad for p in frozen):
            raise TypeError(f"features of the frozen text tower are wanted, {_TRAINED}")

        def compute() -> Tensor:
            with self._without_adapters(), torch.no_grad():
                if reading is None:
                    features = towers.text(self.clip, prompts.ids)
                else:
                    features = TextPass(self.clip, reading, None, self.layout, Kept()).features(prompts)
                return F.normalize(features, dim=-1).unflatten(0, (len(prompts.names), len(prompts.templates)))

        return self.kept.get(f"frozen {prompts.templates}", (prompts, precision_of(frozen[0]), stamp(frozen)), compute)

    def zero_shot_logits(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the model without any adapter, in the classifier's own templates, without gradients.

        In a training step whose image features no adapter touches, those of the forward before are taken. images are
        that forward's. Raises TypeError where weights of the model itself are trained.
        """
        found = self.kept.values.pop(STEP_IMAGES, None)
        features = None if found is None or found[1].requires_grad else found[1]
        texts, towers = F.normalize(self.frozen_texts().mean(1), dim=-1), two_towers_of(self.clip)
        with torch.no_grad():
            if features is None:
                if any(p.requires_grad for p in _own_parameters(self.clip)):
                    raise TypeError(f"zero-shot logits are wanted, {_TRAINED}")
                with self._without_adapters():
                    features = self.image_features(images)
            logits = towers.scale(self.clip) * cosines(features, texts)
            bias = towers.bias(self.clip)
            return logits if bias is None else logits + bias

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        slots = [module for module in self.modules() if isinstance(module, Slots)]
        active, ends = [each.active for each in slots], self.layout.ends
        try:
            for each in slots:
                each.active = ()
            yield
        finally:
            self.layout.ends = ends
            for each, names in zip(slots, active, strict=True):
                each.active = names

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

        made_of = (prompts, stamp([self.clip]), precision_of(next(self.clip.parameters())))
        return self.kept.get("features", made_of, whole)

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

    def prompts_with(self, templates: Sequence[str], names: Sequence[str] | None = None) -> ClassPrompts:
        """The classes in other templates, or others, on the model's device."""
        templates, names = tuple(templates), self.class_names if names is None else tuple(names)
        device = next(self.clip.parameters()).device
        key = f"prompts {templates}" if names == self.class_names else f"prompts {templates} of others"
        return self.kept.get(key, (names, templates, device), lambda: self._write(names, templates, None).to(device))

    def _write(
        self, names: tuple[str, ...], templates: tuple[str, ...], descriptions: Descriptions | None
    ) -> ClassPrompts:
        if descriptions is not None:
            return described_prompts(names, descriptions, self.tokenizer, self._ends)
        return class_prompts(names, templates, self.tokenizer, self._ends)

    def _ends(self, ids: Tensor) -> Tensor:
        reading = two_towers_of(self.clip).reading(self.clip)
        return ids.argmax(-1) if reading is None else reading.ends(self.clip, ids)

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

    def _features_in_losses(self) -> bool:
        modules = self.live("text.context") + self.live("text.output")
        return any(getattr(module, "features_in_losses", False) for module in modules)

    def _reads_images(self) -> bool:
        return any(getattr(module, "reads_images", False) for module in self.live("text.context"))

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """nn.Module.train; what was kept is forgotten."""
        self.kept.clear()
        return super().train(mode)


_TRAINED = (
    "and weights of that tower are trained: combine the method that wants them with one that leaves the model's own "
    "weights as they are"
)


def _own_parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """Without those of adapters."""
    if isinstance(part, nn.Parameter):
        return [part]
    return [p for path, p in part.named_parameters() if "delta" not in path.split(".")]


STEP_TEXTS, STEP_IMAGES = "texts of the last forward in training", "images of the last forward in training"
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
