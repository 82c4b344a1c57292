"""Generated scenes: exact masks, boxes and classes, the same for the same seed."""

import numpy as np
import pytest
import torch

from deltalens.data import scenes
from deltalens.data.drawn_shapes import SHAPES
from deltalens.data.scenes import CLASSES, GROUND, OBJECTS, draw_scene, make_scenes


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(scenes, "VAL_SCENES", 6)
    monkeypatch.setattr(scenes, "TEST_SCENES", 2)


def test_the_three_tasks_show_the_same_scenes():
    masks, boxes, both = (make_scenes(3, 64, 1, task) for task in ("segmentation", "detection", "instance"))
    assert masks.class_names == [GROUND, *CLASSES]
    assert boxes.class_names == both.class_names == list(CLASSES)
    assert [len(part) for part in (masks.train, masks.val, masks.test)] == [3, 6, 2]
    assert (masks.task, boxes.task, both.task) == ("segmentation", "detection", "instance")
    for i in range(len(masks.val)):
        (image, semantic), (other, target), (_, full) = masks.val[i], boxes.val[i], both.val[i]
        assert np.array_equal(np.asarray(image), np.asarray(other))
        assert torch.equal(target["boxes"], full["boxes"])
        assert len(target["labels"]) in range(1, OBJECTS[1] + 1)
        assert full["masks"].sum(0).max() == 1
        drawn = (full["masks"] * (full["labels"] + 1)[:, None, None]).sum(0)
        assert torch.equal(drawn, semantic)
        assert masks.val.labels[i].tolist() == [int((semantic == label).any()) for label in range(7)]
        for box, mask, area in zip(full["boxes"].int().tolist(), full["masks"], full["area"], strict=True):
            left, top, right, bottom = box
            assert mask[top:bottom, left:right].sum() == mask.sum() == area > 0
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()
    assert "masks" not in boxes.val[0][1]


def test_seeds_and_counts():
    one, more, other = make_scenes(2, 48, 0), make_scenes(4, 48, 0), make_scenes(2, 48, 1)
    assert np.array_equal(one.train.pictures, more.train.pictures[:2])
    assert np.array_equal(one.test.pictures, more.test.pictures)
    assert not np.array_equal(one.train.pictures[0], one.val.pictures[0])
    assert not np.array_equal(one.train.pictures, other.train.pictures)
    assert all(name in SHAPES for name in CLASSES)


def test_masks_lie_on_their_shapes():
    """The colour changes where a mask ends: across its edge more than inside it."""
    across, inside = [], []
    for seed in range(6):
        scene = draw_scene(96, np.random.default_rng(seed))
        steps = np.abs(np.diff(scene.picture.astype(float), axis=1)).sum(2)
        edge = np.diff(scene.semantic.astype(int), axis=1) != 0
        across += steps[edge].tolist()
        inside += steps[~edge].tolist()
    assert np.mean(across) > 5 * np.mean(inside)


def test_wrong_scenes():
    for wrong, words in (
        ({"task": "depth"}, "not for 'depth'"),
        ({"count": 0}, "a count from 1"),
        ({"size": 16}, "32"),
    ):
        with pytest.raises(ValueError, match=words):
            make_scenes(**({"count": 1, "size": 32} | wrong))
