"""Learned words in the texts of classes: what CoOp and all that follow it have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltalens.backbones.class_prompts import ClassPrompts, word_counts
from deltalens.backbones.two_towers import TextReading, two_towers_of
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.sites.anatomy import Anatomy, Site, require

POSITIONS = ("end", "middle", "front")


class Context(nn.Module):
    """`text.context`: m learned words beside the name of each class.

        end:     start | ctx_1 ... ctx_m | name | . end         middle: start | ctx_1 .. | name | .. ctx_m | . end
        front:   start | name | ctx_1 ... ctx_m | . end

    Texts of SigLIP have no start; there the words come first, and padding follows the end as in training.

    words: their first values, (m, d) for all classes or (C, m, d) for each one's own. template: the text that they
    take places in, with m words before {}.
    """

    classes: tuple[str, ...] | None = None  # whose words these are, of words for each class

    def __init__(self, words: Tensor, template: str, position: str = "end"):
        super().__init__()
        self.ctx = nn.Parameter(words)
        self.template, self.position = template, position

    def check_classes(self, names: tuple[str, ...]) -> None:
        """ValueError where the words belong to other classes."""
        if self.classes is not None and names != self.classes:
            raise ValueError(
                f"this adapter has words of their own for {len(self.classes)} classes, and there are {len(names)} "
                f"others: its own are {_shown(self.classes)}, the others {_shown(names)}. Train words for all classes "
                "in common, or on these classes"
            )

    @property
    def count(self) -> int:
        return self.ctx.shape[-2]

    def forward(self, embedded: Tensor, prompts: ClassPrompts, image_features: Tensor | None = None) -> Tensor:
        """Embedded texts (C, L, d) -> the same with the context in them."""
        return self.put(embedded, self.ctx, prompts)

    def put(self, embedded: Tensor, context: Tensor, prompts: ClassPrompts) -> Tensor:
        """context (m, d), (C, m, d), or (B, 1, m, d): then (B, C, L, d)."""
        classes, count = len(embedded), self.count
        if context.dim() == 3 and len(context) != classes:
            raise ValueError(
                f"this adapter has words of their own for {len(context)} classes, and there are {classes}: train "
                "words for all classes in common, or on these classes"
            )
        context = context.to(embedded.dtype)
        lead = context.shape[:-3] if context.dim() == 4 else ()
        context = context.expand(*lead, classes, -1, -1)
        embedded = embedded.expand(*lead, -1, -1, -1)
        begin, rest = embedded[..., : prompts.begin, :], embedded[..., prompts.begin + count :, :]
        if self.position == "end":
            return torch.cat([begin, context, rest], -2)
        front = count // 2 if self.position == "middle" else 0
        rows = [
            torch.cat([context[..., i, :front, :], rest[..., i, :length, :], context[..., i, front:, :],
                       rest[..., i, length:, :]], -2)
            for i, length in enumerate(prompts.name_lengths.tolist())
        ]  # fmt: skip
        return torch.cat([begin, torch.stack(rows, -3)], -2)


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


class ComparedContext(Context):
    """CoOp's words, for methods whose loss terms read the step's features."""

    features_in_losses = True


def classifier_of(model: nn.Module, method: str) -> ZeroShotClassifier:
    """The model as a classifier made of texts; TypeError for others."""
    if not isinstance(model, ZeroShotClassifier):
        raise TypeError(f"{method} needs a classifier made of class names, not {type(model).__name__}")
    return model


def text_owner(
    anatomy: Anatomy, slot: str, method: str, both_ways: bool = False
) -> tuple[Site, ZeroShotClassifier, TextReading]:
    """(place of the classifier's text slots, the classifier, how its text tower is read). TypeError for other models,
    and for towers that do not read texts from front to end.

    both_ways: towers that read in both directions will do where the features are not read from a word's place (SigLIP:
    from the last position, behind the padding).
    """
    model = anatomy.model
    owners = [tower.owner for tower in anatomy.towers if tower.name == "text" and tower.owner is not None]
    reading = two_towers_of(model.clip).reading(model.clip) if isinstance(model, ZeroShotClassifier) else None
    if not owners or not isinstance(model, ZeroShotClassifier) or reading is None:
        raise TypeError(
            f"{method} changes the texts of classes, and {type(model).__name__} has none that are known: build the "
            "model with create_backbone('open_clip/...', class_names=[...])"
        )
    if not reading.causal(model.clip) and not (both_ways and _pools_beside_words(model, reading)):
        raise TypeError(f"{method} needs a text tower that reads from front to end and pools there, as CLIP's does")
    require(owners[0], slot, method, model)
    return owners[0], model, reading


def _pools_beside_words(model: ZeroShotClassifier, reading: TextReading) -> bool:
    """Whether a tower's features are read before all words, or from the last position."""
    ids = model.tokenizer(["", "a"])
    begin = int((ids[0] != ids[1]).nonzero()[0])
    return all(end < begin or end == ids.shape[1] - 1 for end in reading.ends(model.clip, ids).tolist())


def first_words(
    model: ZeroShotClassifier, reading: TextReading, count: int, text: str | None, classes: int | None = None
) -> tuple[Tensor, str]:
    """(words (m, d) or (classes, m, d), template): those of a text, or `count` drawn from N(0, 0.02). ValueError where
    the tokenizer has no word of one token to hold their places."""
    table = reading.tokens(model.clip)
    if text is not None:
        text = text.replace("_", " ").strip()
        begin, counts = word_counts([text], model.tokenizer)
        ids = model.tokenizer([text])[:, begin : begin + int(counts[0])]
        with torch.no_grad():
            words = table(ids.to(table.weight.device))[0].clone()
        template = f"{text} {{}}."
    else:
        words = torch.empty(count, table.weight.shape[1], device=table.weight.device, dtype=table.weight.dtype)
        nn.init.normal_(words, std=0.02)
        places = " ".join(["X"] * count)
        found = int(word_counts([places], model.tokenizer)[1][0])
        if found != count:
            raise ValueError(
                f"the tokenizer makes {found} tokens of {places!r}, which was to hold the places of {count}: give "
                "init, a text whose words are the first values"
            )
        template = f"{places} {{}}."
    if classes is not None:
        words = words.expand(classes, -1, -1).clone() if text is not None else _drawn_for_each(words, classes)
    return words, template


def _drawn_for_each(words: Tensor, classes: int) -> Tensor:
    return nn.init.normal_(words.new_empty(classes, *words.shape), std=0.02)
