"""The format "hf": with a stand-in for the library's tables, and with the library itself where it is installed."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from deltalens.data import ReadOptions, read_data, read_part


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Sequence:
    def __init__(self, feature):
        self.feature = feature


class Value:
    pass


class Table:
    """What we use of a `datasets.Dataset`: features, a column by its name, a row by its number."""

    def __init__(self, features, labels, column="label"):
        self.features, self.column, self.labels = features, column, labels

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.labels
        return {"img": Image.new("RGB", (4, 3), (10 * key, 0, 0)), self.column: self.labels[key]}


class Picture:
    pass


Picture.__name__ = "Image"  # types are known by their names, so that the library need not be imported
IMAGE = {"img": Picture()}


@pytest.fixture
def library(monkeypatch):
    """Puts a stand-in in the place of `datasets`; its content is what load_from_disk and load_dataset give."""
    fake = SimpleNamespace(content=None, asked=[])
    fake.load_from_disk = lambda folder: fake.content
    fake.load_dataset = lambda name, subset: fake.asked.append((name, subset)) or fake.content
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def saved(folder):
    (folder / "dataset_dict.json").write_text("{}")
    return folder


def test_named_labels_and_splits(tmp_path, library):
    features = IMAGE | {"label": ClassLabel(["cat", "dog"])}
    labels = {"train": [1, 0, 1], "validation": [0], "test": [1]}
    library.content = {split: Table(features, values) for split, values in labels.items()}
    data = read_data(saved(tmp_path))
    assert (data.origin["format"], data.class_names) == ("hf", ["cat", "dog"])
    assert (data.train.labels, data.val.labels, data.test.labels) == ([1, 0, 1], [0], [1])
    assert data.train.image(2).getpixel((0, 0)) == (20, 0, 0)
    assert read_part(tmp_path, "test", ["dog", "cat"], data.origin).labels == [0]


def test_a_test_part_without_labels_is_no_test(tmp_path, library):
    features = IMAGE | {"label": ClassLabel(["cat", "dog"])}
    labels = {"train": [1, 0, 1], "validation": [0], "test": [-1, -1]}
    library.content = {split: Table(features, values) for split, values in labels.items()}
    assert read_data(saved(tmp_path)).test is None


def test_labels_without_names_and_one_table(tmp_path, library):
    library.content = Table(IMAGE | {"label": Value()}, ["b", "a"] * 10)
    data = read_data(saved(tmp_path))
    assert data.class_names == ["a", "b"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 4]


def test_several_labels(tmp_path, library):
    features = IMAGE | {"labels": Sequence(ClassLabel(["x", "y", "z"]))}
    library.content = {"train": Table(features, [[0, 2], []], "labels"), "valid": Table(features, [[1]], "labels")}
    data = read_data(saved(tmp_path))
    assert data.task == "multilabel"
    assert [label.tolist() for label in data.train.labels] == [[1, 0, 1], [0, 0, 0]]


def test_names_on_the_hub_need_download(tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.content = Table(IMAGE | {"label": ClassLabel(["a", "b"])}, [0, 1] * 8)
    with pytest.raises(FileNotFoundError, match="--download true"):
        read_data("someone/birds", "hf")
    read_data("someone/birds", "hf/small", options=ReadOptions(download=True))
    assert library.asked == [("someone/birds", "small")]


def test_wrong_tables(tmp_path, library):
    with pytest.raises(ValueError, match="was not written by save_to_disk"):
        read_data(tmp_path, "hf")
    saved(tmp_path)
    library.content = {"train": Table({"text": Value(), "label": ClassLabel(["a", "b"])}, [0])}
    with pytest.raises(ValueError, match=r"no column of images; it has text \(Value\), label \(ClassLabel\)"):
        read_data(tmp_path)
    library.content = {"extra": Table(IMAGE | {"label": ClassLabel(["a", "b"])}, [0])}
    with pytest.raises(ValueError, match="the parts extra but no train"):
        read_data(tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "deltalens\[datasets\]"'):
        read_data(saved(tmp_path))


def test_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (4, 3), (10 * i, 0, 0)) for i in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    data = read_data(tmp_path / "saved")
    assert data.class_names == ["cat", "dog"]
    assert data.test.labels == [0, 1] * 4
    assert data.test.image(3).getpixel((0, 0)) == (30, 0, 0)
