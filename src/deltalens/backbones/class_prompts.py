"""Classes as texts: a name in one or several templates, or sentences about each class, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]  # texts -> token ids (n, L), padded to the context length
Descriptions = Mapping[str, tuple[str, ...]]  # class -> its sentences
TEMPLATE = "a photo of a {}."
IMAGENET_SELECT = (  # the seven of those published with CLIP that suit ImageNet together
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """The P texts of C classes, class by class: T templates of each, or any number of sentences.

    names: as shown; "_" is read as a space. templates: empty where the texts are sentences. ids: (P, L). ends: (P,),
    the position whose features count. name_lengths: (C,), tokens of each name. counts: texts of each class. begin:
    tokens that every text begins with, 1 in CLIP, 0 in SigLIP.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    ids: Tensor
    ends: Tensor
    name_lengths: Tensor
    counts: tuple[int, ...]
    begin: int = 1

    @property
    def single(self) -> bool:
        """Whether every class has one text."""
        return len(self.ids) == len(self.names)

    def averaged(self, features: Tensor, axis: int = 0) -> Tensor:
        """Means over the texts of each class: P becomes C on that axis."""
        if len(set(self.counts)) == 1:
            return features.unflatten(axis, (len(self.names), self.counts[0])).mean(axis + 1)
        return torch.stack([part.mean(axis) for part in features.split(self.counts, axis)], axis)

    def to(self, device: Any) -> ClassPrompts:
        """The same on a device."""
        if self.ids.device == torch.device(device):
            return self
        return replace(
            self, ids=self.ids.to(device), ends=self.ends.to(device), name_lengths=self.name_lengths.to(device)
        )


def class_prompts(
    names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer,
    ends: Callable[[Tensor], Tensor],
) -> ClassPrompts:
    """Write every name into every template ("a photo of a {}.") and tokenize it.

    ends: ids (n, L) -> positions (n,). Raises ValueError for no or repeated names, a template without {}, and a text
    that is longer than the model's context.
    """
    names, templates = _checked(names), tuple(templates)
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"a template has {{}} where the name of the class goes, such as {TEMPLATE!r}: {template!r}"
            )
    if not templates:
        raise ValueError("no template was given")
    return _tokenized(names, [templates] * len(names), templates, tokenizer, ends)


def described_prompts(
    names: Sequence[str], descriptions: Descriptions, tokenizer: Tokenizer, ends: Callable[[Tensor], Tensor]
) -> ClassPrompts:
    """The same with sentences of each class, any number; {} in them, if any, is where the name goes."""
    names = _checked(names)
    sentences = [descriptions.get(name, ()) for name in names]
    missing = [name for name, found in zip(names, sentences, strict=True) if not found]
    if missing:
        raise ValueError(f"the descriptions have no sentences for {len(missing)} classes: {', '.join(missing[:5])}")
    return _tokenized(names, sentences, (), tokenizer, ends)


def whole_texts(texts: Sequence[str], tokenizer: Tokenizer, ends: Callable[[Tensor], Tensor]) -> ClassPrompts:
    """Texts as they stand, each for itself, such as queries of a search. ValueError for none, empty or repeated ones,
    and for one that is longer than the model's context."""
    texts = tuple(texts)
    repeated = next((text for text in texts if texts.count(text) > 1), None)
    if not texts or repeated is not None or any(not text.strip() for text in texts):
        wrong = "none" if not texts else "an empty one" if repeated is None else f"{repeated!r} twice"
        raise ValueError(f"texts must be different and not empty, got {wrong}")
    return _as_ids(texts, (), texts, texts, (1,) * len(texts), tokenizer, ends)


def as_descriptions(names: Sequence[str], descriptions: Any) -> Descriptions:
    """Sentences by class, from a mapping (which may have more classes), or from one list for each name, in order."""
    if not isinstance(descriptions, Mapping):
        lists = list(descriptions)
        if len(lists) != len(names):
            raise ValueError(f"there are {len(names)} classes and descriptions of {len(lists)}")
        descriptions = dict(zip(names, lists, strict=True))
    wrong = next((name for name, found in descriptions.items() if isinstance(found, str)), None)
    if wrong is not None:
        raise ValueError(f"descriptions are lists of sentences, and that of {wrong} is one string")
    return {name: tuple(found) for name, found in descriptions.items()}


# ------------------------------------------------------------------ details
def _checked(names: Sequence[str]) -> tuple[str, ...]:
    names = tuple(names)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or repeated:
        raise ValueError(f"every class needs a name of its own, got {'none' if not names else repeated[0] + ' twice'}")
    if any(not name.strip() for name in names):
        raise ValueError(f"the name of class {[bool(name.strip()) for name in names].index(False)} is empty")
    return names


def _tokenized(
    names: tuple[str, ...],
    forms: Sequence[Sequence[str]],
    templates: tuple[str, ...],
    tokenizer: Tokenizer,
    ends: Callable[[Tensor], Tensor],
) -> ClassPrompts:
    """forms: of each class, texts with {} for its name."""
    words = [name.replace("_", " ").strip() for name in names]
    texts = [form.replace("{}", word) for word, own in zip(words, forms, strict=True) for form in own]
    return _as_ids(names, templates, words, texts, tuple(map(len, forms)), tokenizer, ends)


def _as_ids(
    names: tuple[str, ...],
    templates: tuple[str, ...],
    words: Sequence[str],
    texts: Sequence[str],
    counts: tuple[int, ...],
    tokenizer: Tokenizer,
    ends: Callable[[Tensor], Tensor],
) -> ClassPrompts:
    """words: the names as they stand in the texts. texts: counts[c] of each class c, class by class."""
    words, texts = list(words), list(texts)
    ids = tokenizer(texts)
    positions = ends(ids)
    cut = _cut_off(texts, ids, tokenizer)
    if cut is not None:
        raise ValueError(f"{cut!r} is longer than the {ids.shape[1]} tokens that the text tower reads")
    begin, lengths = word_counts(words, tokenizer)
    return ClassPrompts(names, templates, ids, positions, lengths, counts, begin)


def word_counts(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[int, Tensor]:
    """(tokens that every text begins with, (n,) tokens of the words of each text): what stands behind these is what an
    empty text has."""
    empty, word = tokenizer(["", "a"])
    begin = int((empty != word).nonzero()[0])
    rows, rest = tokenizer(list(texts))[:, begin:], empty[begin:]
    length = len(rest)
    matches = torch.stack([(rows[:, n:] == rest[: length - n]).all(1) for n in range(length + 1)], 1)
    return begin, matches.int().argmax(1)  # the first


def _cut_off(texts: list[str], ids: Tensor, tokenizer: Tokenizer) -> str | None:
    """A text that did not fit: one that looks the same with a word more."""
    full = [i for i in range(len(texts)) if not (ids[i] == ids[i, -1]).sum() > 1]
    if not full:
        return None
    longer = tokenizer([f"{texts[i]} x" for i in full])
    return next((texts[i] for i, row in zip(full, longer, strict=True) if torch.equal(row, ids[i])), None)
