"""The readers on real data, where it is: as many pictures, boxes and masks as it has."""

from functools import cache

import numpy as np
import pytest
from reference import SHARED

from deltalens.data import read_data

DATA = SHARED / "data"


@cache
def shared(name: str, task: str | None = None):
    if not (DATA / name).is_dir():
        pytest.skip(f"needs ../shared/data/{name}")
    return read_data(DATA / name, task=task)


@pytest.mark.parametrize(
    ("name", "task", "sizes", "classes", "objects"),
    [
        ("camvid", "segmentation", (367, 101, 233), 11, None),
        ("det/bccd", "detection", (205, 87, 72), 3, 4886),
        ("det/raccoon", "detection", (122, 29, 49), 1, 217),
        ("inst/nuclei", "instance", (160, 40, 60), 1, 10004),
        ("inst/coco128", "instance", (100, 40, 60), 80, 1442),
        ("inst/coco128", "segmentation", (100, 40, 60), 133, None),
    ],
)
def test_numbers(name, task, sizes, classes, objects):
    data = shared(name, task)
    assert (data.task, tuple(map(len, (data.train, data.val, data.test)))) == (task, sizes)
    assert (len(data.class_names), data.origin.get("objects")) == (classes, objects)
    assert not data.origin.keys() & {"clipped", "dropped", "without_mask"}
    if task == "instance":
        for i in range(0, len(data.val), 8):
            target = data.val[i][1]
            assert (np.array([mask.sum() for mask in target["masks"]]) == target["area"].numpy()).all()


def test_pixels_of_camvid():
    """The first training picture's pixels of every class, counted from its file."""
    data = shared("camvid", "segmentation")
    assert data.class_names[:2] == ["sky", "building"]
    counts = np.zeros(256, int)
    for i in range(0, len(data.train), 40):
        counts += np.bincount(data.train[i][1].numpy().reshape(-1), minlength=256)
    assert counts[:11].all()
    assert counts[255] > 0
    assert counts[11:255].sum() == 0
