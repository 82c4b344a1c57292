"""Pictures drawn by code: what is in them, and which combinations the shipped CLIP has not seen."""

import numpy as np
import pytest

from deltalens.data.drawn_classes import BASE, NOVEL, draw_classes
from deltalens.data.drawn_shapes import CHALK, COLOURS, FLAT, HELD_OUT, SHAPES, TEXTURES, Look, draw, draw_all


def picture(texture="plain", colour="red", shape="square", style=FLAT, seed=0, size=48):
    return draw(Look(texture, colour, shape), style, np.random.RandomState(seed), size).astype(int)


def near(image, colour, distance=70):
    return np.abs(image - np.array(COLOURS[colour])).sum(-1) < distance


def test_same_seed_same_picture_and_each_word_changes_it():
    reference = picture()
    assert reference.shape == (48, 48, 3)
    assert np.array_equal(reference, picture())
    for other in ({"texture": "dotted"}, {"colour": "blue"}, {"shape": "star"}, {"style": CHALK}, {"seed": 1}):
        assert not np.array_equal(reference, picture(**other))
    assert picture(size=20).shape == (20, 20, 3)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_those_of_their_names(colour):
    shades = [near(picture(colour=colour, seed=seed), colour).mean() for seed in range(3)]
    others = [near(picture(colour="red" if colour != "red" else "blue", seed=seed), colour).mean() for seed in range(3)]
    assert min(shades) > 0.1
    assert max(others) < min(shades)


def test_textures_cover_a_part_with_a_second_colour():
    whole = near(picture("plain"), "red").sum()
    for texture in set(TEXTURES) - {"plain"}:
        assert 0.2 * whole < near(picture(texture), "red").sum() < 0.85 * whole


def test_a_ring_is_open_and_shapes_differ():
    middle = (slice(22, 26), slice(22, 26))
    still = FLAT.__class__(**{**vars(FLAT), "shift": 0.0, "shade": 0.0, "grain": 0.0})
    assert near(picture(shape="circle", style=still), "red")[middle].all()
    assert not near(picture(shape="ring", style=still), "red")[middle].any()
    covers = {shape: near(picture(shape=shape, style=still), "red").tobytes() for shape in SHAPES}
    assert len(set(covers.values())) == len(SHAPES)


@pytest.mark.parametrize("words", [("wavy", "red", "star"), ("plain", "teal", "star"), ("plain", "red", "blob")])
def test_unknown_words_are_named(words):
    with pytest.raises(ValueError, match=next(word for word in words if word in ("wavy", "teal", "blob"))):
        Look(*words)


def test_many_pictures_are_the_single_ones_in_turn():
    looks = [Look("plain", "red", "star"), Look("dotted", "blue", "ring")]
    rng = np.random.RandomState(3)
    assert np.array_equal(draw_all(looks, CHALK, 3), np.stack([draw(look, CHALK, rng) for look in looks]))


# ------------------------------------------------------------------ base and novel classes
def test_halves_are_disjoint_and_of_pairs_that_were_held_out():
    assert len(HELD_OUT) == len(COLOURS) * len(SHAPES) // 4
    assert not {look.name for look in BASE} & {look.name for look in NOVEL}
    assert {(look.colour, look.shape) for look in (*BASE, *NOVEL)} == HELD_OUT
    for half in (BASE, NOVEL):
        assert {look.shape for look in half} == set(SHAPES)
        assert {look.colour for look in half} == set(COLOURS)
        assert {look.texture for look in half} == set(TEXTURES)


def test_shots_are_of_every_class_and_begin_alike():
    two, three = (
        draw_classes(24, shots=2, val_images=1, test_images=2),
        draw_classes(24, 3, val_images=1, test_images=2),
    )
    assert np.bincount(three.train.labels).tolist() == [3] * len(BASE)
    assert np.array_equal(two.train.images, three.train.images[: len(two.train)])
    assert np.array_equal(two.novel.images, three.novel.images)
    assert (len(two.val), len(two.test), len(two.novel)) == (10, 20, 20)
    assert two.class_names == tuple(look.name for look in BASE)
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        draw_classes(shots=0)
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        draw_classes(4)
