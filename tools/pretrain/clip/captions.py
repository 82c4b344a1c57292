"""What the texts of a training step are, and which images each of them describes."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deltalens.backbones.class_prompts import IMAGENET_SELECT
from deltalens.data.drawn_shapes import COLOURS, FLAT, HELD_OUT, SHAPES, TEXTURES, Look, draw_all

MORE_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "{}",
    "a {}.",
    "the {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of the {}.",
    "a good photo of a {}.",
    "a close-up photo of the {}.",
    "a cropped photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of a {}.",
    "a picture of one {}.",
    "there is a {} in this picture.",
    "this is a very small picture, and what can be seen in the middle of it is a {}.",
    "in the foreground of the photo, before a background that does not matter, there is a {}.",
)
DRAWN_TEMPLATES = (
    "a {}.",
    "{}",
    "the {}.",
    "a photo of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "art of the {}.",
    "a drawing of one {} on a plain background.",
    "a photo of the small {}.",
    "a photo of the large {}.",
)
ANY_SHAPE = "shape"
FIRST_NAME, FULL_CAPTION = 0.5, 0.5  # shares
PARTS = (("colour", "shape"), ("texture", "shape"), ("texture", "colour"), ("colour",), ("shape",), ("texture",))


def synonyms(root: Path) -> list[list[str]]:
    """All names of each class, in label order; the first is the usual one."""
    classes = json.loads((root / "meta.json").read_text())["classes"]
    return [[word.strip() for word in entry["words"].split(",")] for entry in classes]


def drawn_pictures(count: int, seed: int, held_out: bool = False) -> tuple[torch.Tensor, list[Look]]:
    """Pictures (N, 3, 48, 48) uint8 in the style FLAT and what they show. held_out: of the pairs kept from training."""
    rng = random.Random(seed)
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out]
    looks = [Look(rng.choice(list(TEXTURES)), *rng.choice(pairs)) for _ in range(count)]
    pictures = draw_all(looks, FLAT, seed)
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))), looks


def words(looked: dict[str, str]) -> str:
    """{"texture": "striped", "shape": "star"} -> "striped star"."""
    named = {"shape": ANY_SHAPE} | looked
    return " ".join(named[part] for part in ("texture", "colour", "shape") if part in named)


@dataclass(frozen=True)
class Texts:
    """texts: T captions. positives: (B, T), whether a caption describes an image."""

    texts: list[str]
    positives: torch.Tensor


class Captions:
    """Captions of photographs of 200 classes, and of drawn pictures behind them.

    labels of photographs are 0..199; label 200 + i is the drawn picture i. A step's texts are one caption of every
    class, all in one template, whether the batch shows the class or not, and one of each drawn picture, whole or in
    part ("red star", "dotted shape"). A part describes all pictures that have it.
    """

    def __init__(self, names: Sequence[Sequence[str]], looks: Sequence[Look]):
        self.names, self.looks = names, looks

    def vocabulary(self) -> list[str]:
        """Texts that have every token of every caption."""
        templates = (*IMAGENET_SELECT, *MORE_TEMPLATES, *DRAWN_TEMPLATES)
        shown = [*TEXTURES, *COLOURS, *SHAPES, ANY_SHAPE]
        return [name for each in self.names for name in each] + [t.replace("{}", "") for t in templates] + shown

    def of(self, labels: torch.Tensor, rng: random.Random) -> Texts:
        template = rng.choice(IMAGENET_SELECT + MORE_TEMPLATES)
        texts = [template.replace("{}", self._name(each, rng)) for each in self.names]
        classes = len(texts)
        columns: dict[frozenset, int] = {}
        drawn = [(row, self._parts(label)) for row, label in enumerate(labels.tolist()) if label >= classes]
        for _, look in drawn:
            kept = tuple(look) if rng.random() < FULL_CAPTION else rng.choice(PARTS)
            shown = {part: look[part] for part in kept}
            if frozenset(shown.items()) not in columns:
                columns[frozenset(shown.items())] = len(texts)
                texts.append(rng.choice(DRAWN_TEMPLATES).replace("{}", words(shown)))
        positives = torch.zeros(len(labels), len(texts), dtype=torch.bool)
        photographs = (labels < classes).nonzero().squeeze(1)
        positives[photographs, labels[photographs]] = True
        for row, look in drawn:
            for shown, column in columns.items():
                positives[row, column] = shown <= look.items()
        return Texts(texts, positives)

    @staticmethod
    def _name(names: Sequence[str], rng: random.Random) -> str:
        return names[0] if len(names) == 1 or rng.random() < FIRST_NAME else rng.choice(names[1:])

    def _parts(self, label: int) -> dict[str, str]:
        look = self.looks[label - len(self.names)]
        return {"texture": look.texture, "colour": look.colour, "shape": look.shape}
