"""Pixels of VOC's boxes: the challenge's own files count them from 1, and overlaps are those of its tools."""

import numpy as np
import pytest
import torch
from dense_folders import HEIGHT, VOC_LISTS, WIDTH, voc

from deltalens.data import read_data
from deltalens.tasks.box_metrics import VocAveragePrecision

SOURCE = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"


def read_detection(root):
    return read_data(root, task="detection")  # without the task the 20 classes of the challenge are labels of pictures


def official(root, objects, files="*.xml", lists=VOC_LISTS):
    """A VOC folder, with the challenge's mark in these files."""
    voc(root, lists, objects)
    for file in (root / "Annotations").glob(files):
        file.write_text(file.read_text().replace("<annotation>", f"<annotation>{SOURCE}", 1))
    return root


def test_a_whole_picture_of_the_challenge_is_a_whole_picture(tmp_path):
    data = read_detection(official(tmp_path, {"a0": [("dog", (1, 1, WIDTH, HEIGHT))]}))
    assert data.origin["first_pixel"] == 1
    assert "clipped" not in data.origin
    assert data.train[0][1]["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert data.train[1][1]["boxes"].tolist() == [[0, 1, 7, 9], [3, 3, 14, 11]]
    assert data.train[1][1]["area"].tolist() == [56, 88]


@pytest.mark.parametrize(("files", "first"), [("a*.xml", (1, 2)), ("*.xml", (0, 2))], ids=["other tools", "from 0"])
def test_boxes_of_other_tools_are_taken_as_they_are(tmp_path, files, first):
    data = read_detection(official(tmp_path, {"a0": [("dog", (*first, 7, 9))]}, files))
    assert "first_pixel" not in data.origin
    assert data.train[0][1]["boxes"].tolist() == [[first[0], first[1], 7, 9]]
    assert data.test[0][1]["boxes"].tolist() == [[1, 2, 7, 9], [4, 4, 14, 11]]


def tools_ap(found, truth, scores):
    """The eleven-point AP as the challenge measures it, of boxes of last pixels from 1, one for each picture."""
    left_top = np.maximum(found[:, :2], truth[:, :2])
    width, height = np.maximum(np.minimum(found[:, 2:], truth[:, 2:]) - left_top + 1, 0).T
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2] + 1, 1) for boxes in (found, truth)]
    overlap = width * height / (areas[0] + areas[1] - width * height)
    right = (overlap >= 0.5)[np.argsort(-scores)].cumsum()
    precision, recall = right / np.arange(1, len(right) + 1), right / len(truth)
    return np.mean([max(precision[recall >= level - 1e-9], default=0) for level in np.arange(11) / 10])


def test_the_eleven_point_ap_is_that_of_the_challenges_tools(tmp_path):
    random = np.random.default_rng(0)
    found, truth = random.integers((1, 1, 4, 4), (5, 5, 8, 8), (2, 200, 4))  # small ones, in which one pixel decides
    scores = random.random(200)
    names = [f"a{i:03}" for i in range(200)]
    objects = {name: [("dog", tuple(box))] for name, box in zip(names, truth.tolist(), strict=True)}
    others = {name: [("dog", (1, 1, 4, 4))] for name in ("y", "z")}
    lists = {"train": ["y"], "val": ["z"], "test": names}
    test = read_detection(official(tmp_path, objects | others, lists=lists)).test
    metric, plain = VocAveragePrecision(1), VocAveragePrecision(1)
    for i in range(200):
        target = {name: test[i][1][name] for name in ("boxes", "labels", "difficult")}
        one = {"scores": torch.tensor(scores[i : i + 1]), "labels": torch.zeros(1, dtype=torch.int64)}
        edges = torch.tensor(found[i : i + 1] - [1, 1, 0, 0], dtype=torch.float32)  # as a network gives them
        metric.update([one | {"boxes": edges}], [target])
        as_written = torch.tensor(truth[i : i + 1], dtype=torch.float32)
        plain.update([one | {"boxes": torch.tensor(found[i : i + 1])}], [target | {"boxes": as_written}])
    expected = tools_ap(found, truth, scores)
    assert float(metric.compute()["map50_voc07"]) == pytest.approx(expected, abs=1e-6)
    assert abs(float(plain.compute()["map50_voc07"]) - expected) > 0.01  # widths without the last pixel are others
