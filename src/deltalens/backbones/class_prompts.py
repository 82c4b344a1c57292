"""Classes as texts: a name in one or several templates, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]  # texts -> token ids (n, L), padded to the context length
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """The texts of C classes in T templates each, class by class.

    names: as shown; "_" is read as a space. ids: (C * T, L). ends: (C * T,), the position whose features count.
    name_lengths: (C,), tokens of each name.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    ids: Tensor
    ends: Tensor
    name_lengths: Tensor

    @property
    def count(self) -> int:
        """Templates of a class, T."""
        return len(self.templates)

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
    names, templates = tuple(names), tuple(templates)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or repeated:
        raise ValueError(f"every class needs a name of its own, got {'none' if not names else repeated[0] + ' twice'}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"a template has {{}} where the name of the class goes, such as {TEMPLATE!r}: {template!r}"
            )
    if not templates:
        raise ValueError("no template was given")
    words = [name.replace("_", " ").strip() for name in names]
    texts = [template.replace("{}", word) for word in words for template in templates]
    ids = tokenizer(texts)
    positions = ends(ids)
    cut = _cut_off(texts, ids, tokenizer)
    if cut is not None:
        raise ValueError(f"{cut!r} is longer than the {ids.shape[1]} tokens that the text tower reads")
    start = int(ends(tokenizer([""]))[0])  # tokens before an empty text's end: those that begin every text
    lengths = ends(tokenizer(words)) - start
    return ClassPrompts(names, templates, ids, positions, lengths)


def _cut_off(texts: list[str], ids: Tensor, tokenizer: Tokenizer) -> str | None:
    """A text that did not fit: one that looks the same with a word more."""
    full = [i for i in range(len(texts)) if not (ids[i] == ids[i, -1]).sum() > 1]
    if not full:
        return None
    longer = tokenizer([f"{texts[i]} x" for i in full])
    return next((texts[i] for i, row in zip(full, longer, strict=True) if torch.equal(row, ids[i])), None)
