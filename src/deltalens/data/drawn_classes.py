"""Two halves of classes of drawn pictures: those to learn from, and those whose names alone are known.

All twenty classes are pairs of colour and shape that the shipped CLIP has not seen in its training (`HELD_OUT`), and
they are drawn in a style that it has not seen. Each half has every shape once, in different colours and textures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltalens.data.digits import Images
from deltalens.data.drawn_shapes import CHALK, COLOURS, HELD_OUT, SHAPES, TEXTURES, Look, Style, draw_all

VAL_IMAGES, TEST_IMAGES = 10, 50  # of each class


def _halves() -> tuple[tuple[Look, ...], tuple[Look, ...]]:
    """For each shape its two held-out colours, one to each half, so that all colours are in both."""
    textures = tuple(TEXTURES)
    halves: tuple[list[Look], list[Look]] = ([], [])
    for j, shape in enumerate(SHAPES):
        own = [colour for colour in COLOURS if (colour, shape) in HELD_OUT]
        for half, found in enumerate(halves):
            colour = own[(j // len(textures) + half) % len(own)]
            found.append(Look(textures[(j + j // len(textures) + half) % len(textures)], colour, shape))
    return tuple(halves[0]), tuple(halves[1])


BASE, NOVEL = _halves()


@dataclass(frozen=True)
class DrawnClasses:
    """train, val, test: pictures of the base classes, novel: those of the others, for testing alone."""

    train: Images
    val: Images
    test: Images
    novel: Images
    class_names: tuple[str, ...]
    novel_names: tuple[str, ...]


def draw_classes(
    size: int = 48,
    shots: int = 16,
    style: Style = CHALK,
    seed: int = 0,
    val_images: int = VAL_IMAGES,
    test_images: int = TEST_IMAGES,
) -> DrawnClasses:
    """Draw `shots` training pictures of each base class, and val and test pictures.

    size: edge in pixels. seed: of the drawing. Fewer shots are the beginning of more; val and test stay the same.
    ValueError for less than one shot or a size below 8.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")

    def part(looks: Sequence[Look], count: int, number: int) -> Images:
        labels = np.tile(np.arange(len(looks)), count)  # classes in turn
        pictures = draw_all([looks[label] for label in labels], style, 10 * seed + number, size)
        return Images(pictures, labels.astype(np.int64))

    return DrawnClasses(
        train=part(BASE, shots, 1),
        val=part(BASE, val_images, 2),
        test=part(BASE, test_images, 3),
        novel=part(NOVEL, test_images, 4),
        class_names=tuple(look.name for look in BASE),
        novel_names=tuple(look.name for look in NOVEL),
    )
