"""VTAB-1k, FGVC and VOC 2007 on miniatures of their real layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from test_formats import pairs, picture, sizes

from deltalens.data import ReadOptions, read_data, read_part
from deltalens.data.fgvc import SETS
from deltalens.data.voc2007 import CLASSES
from deltalens.data.vtab1k import TASKS, task_of


# ------------------------------------------------------------------ VTAB-1k
def write_vtab(folder: Path, lists: dict[str, list[int]]) -> Path:
    for name, labels in lists.items():
        lines = [f"images/{name}/{i:06d}.jpg {label}" for i, label in enumerate(labels)]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for i in range(len(labels)):
            picture(folder / f"images/{name}/{i:06d}.jpg", i)
    return folder


def test_vtab_lists(tmp_path):
    folder = write_vtab(tmp_path / "cifar", {"train800": [5, 99, 5], "val200": [1, 2], "test": [7, 7, 7, 0]})
    for root, format in (
        (tmp_path, "vtab1k/cifar"),
        (tmp_path, "vtab1k/CIFAR-100"),
        (folder, "vtab1k"),
        (folder, "auto"),
    ):
        data = read_data(root, format)
        assert sizes(data) == (3, 2, 4)
        assert data.train.labels == [5, 99, 5]
        assert data.class_names == [str(i) for i in range(100)]
        assert data.origin["published_sizes"] is False
    joined = read_data(folder, protocol="trainval")
    assert (joined.val, joined.train.labels) == (None, [5, 99, 5, 1, 2])
    assert len(read_part(folder, "train", data.class_names, joined.origin)) == 5
    with pytest.raises(ValueError, match="no val part here; it has train, test"):
        read_part(folder, "val", data.class_names, joined.origin)


def test_a_joined_list_is_cut_after_800(tmp_path):
    """As V-PETL Bench ships it: train800val200.txt alone."""
    folder = tmp_path / "kitti"
    picture(folder / "images/a.jpg")
    labels = [i % 4 for i in range(1000)]
    (folder / "train800val200.txt").write_text("\n".join(f"images/a.jpg {label}" for label in labels))
    (folder / "test.txt").write_text("images/a.jpg 3\n" * 711)
    data = read_data(folder)
    assert data.origin["published_sizes"] is True
    assert (data.train.labels, data.val.labels) == (labels[:800], labels[800:])
    (folder / "train800val200.txt").write_text("images/a.jpg 0\n" * 7)
    with pytest.raises(ValueError, match="7 lines, which leaves none"):
        read_data(folder)


def test_vtab_exported_folders(tmp_path):
    for split, labels in {"train800": (0, 1, 3), "val200": (3,), "test": (1, 1)}.items():
        for i, label in enumerate(labels):
            picture(tmp_path / "kitti" / split / str(label) / f"{i}.png")
    data = read_data(tmp_path, "vtab1k/kitti")
    assert (data.train.labels, data.val.labels, data.test.labels) == ([0, 1, 3], [3], [1, 1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "test.txt").write_text("images/test/000000.jpg 4\n"),
            "label 4 in test; kitti has labels 0 to 3",
        ),
        (lambda f: (f / "val200.txt").write_text("images/val200/000000.jpg\n"), r"line 1 of .*val200\.txt is"),
        (lambda f: (f / "test.txt").unlink(), r"has neither lists nor a folder for train; expected the text lists"),
        (lambda f: (f / "train800.txt").unlink(), "has test.txt but no training lists"),
        (lambda f: (f / "images/test/000000.jpg").unlink(), r"1 of the 1 images listed in .*test\.txt are missing"),
    ],
)
def test_wrong_vtab_folders(tmp_path, spoil, message):
    folder = write_vtab(tmp_path / "kitti", {"train800": [0, 1], "val200": [1], "test": [2]})
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, "vtab1k/kitti")


def test_tfrecords_are_refused_and_tasks_named(tmp_path):
    shard = tmp_path / "dmlab/2.0.1/dmlab-train.tfrecord-00000-of-00001"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"TFRecord files, which need tensorflow(.|\n)*train800/<label>"):
        read_data(tmp_path, "vtab1k/dmlab")
    with pytest.raises(ValueError, match="'mnist' is no task of VTAB-1k; write vtab1k/<task> with cifar, caltech101"):
        read_data(tmp_path, "vtab1k/mnist")


def test_the_tasks_are_the_published_ones():
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert sum(task.classes for task in TASKS.values()) == 940
    assert task_of("vtab1k/clevr_distance", "anywhere") == "clevr_dist"
    assert task_of("vtab1k", "/data/vtab-1k/smallnorb_azimuth") == "smallnorb_azi"
    assert task_of("folder", "/data/vtab-1k/svhn") is None


# ------------------------------------------------------------------ FGVC
def write_json(root: Path, images: str, lists: dict[str, dict[str, int]]) -> Path:
    for split, entries in lists.items():
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(entries))
        for i, path in enumerate(entries):
            picture(root / images / path, i)
    return root


JSON = {
    "train": {"003.Crow/a.jpg": 3, "001.Tern/b.jpg": 1, "003.Crow/c.jpg": 3},
    "val": {"001.Tern/d.jpg": 1},
    "test": {"003.Crow/e.jpg": 3, "001.Tern/f.jpg": 1},
}


FOLDERS = {"CUB_200_2011": "images", "nabirds": "images", "stanford_dogs": "Images", "OxfordFlower": "", "cars": ""}


@pytest.mark.parametrize(("name", "images"), FOLDERS.items())
def test_vpts_splits(tmp_path, name, images):
    data = read_data(write_json(tmp_path / name, images, JSON))
    assert data.origin["splits"] == "VPT's"
    assert data.origin["published_sizes"] is False
    assert data.class_names == ["001.Tern", "003.Crow"]
    assert pairs(data.train) == [("a.jpg", 1), ("b.jpg", 0), ("c.jpg", 1)]
    assert pairs(data.val) + pairs(data.test) == [("d.jpg", 0), ("e.jpg", 1), ("f.jpg", 0)]


def test_classes_without_folders_are_numbered(tmp_path, monkeypatch):
    flat = {"train": {"x/1.jpg": 8, "x/2.jpg": 2}, "val": {"x/3.jpg": 8}, "test": {"x/4.jpg": 2}}
    monkeypatch.setitem(SETS, "cars", SETS["cars"]._replace(sizes=(2, 1, 1)))
    data = read_data(write_json(tmp_path, "", flat), "fgvc/cars")
    assert data.origin["published_sizes"] is True
    assert data.class_names == ["2", "8"]
    assert data.train.labels == [1, 0]
    (tmp_path / "val.json").unlink()
    with pytest.raises(ValueError, match=r"lacks val\.json; expected VPT's splits"):
        read_data(tmp_path, "fgvc/cars")
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match=r"neither VPT's splits nor the lists of cars(.|\n)*torchvision/StanfordCars"):
        read_data(tmp_path, "fgvc/cars")


@pytest.mark.parametrize("name", ["cub", "nabirds"])
def test_lists_of_the_bird_sets(tmp_path, name):
    """NABirds has ids with dashes, and classes.txt names the whole tree."""
    root = tmp_path / name
    ids = [f"{i}a-{i}" if name == "nabirds" else str(i) for i in range(1, 25)]
    label = {image: (17, 2, 105)[i % 3] for i, image in enumerate(ids)}
    trained = {image: int(i < 18) for i, image in enumerate(ids)}
    for i, image in enumerate(ids):
        picture(root / f"images/{label[image]}/{image}.jpg", i)
    (root / "images.txt").write_text("".join(f"{i} {label[i]}/{i}.jpg\n" for i in ids))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {label[i]}\n" for i in ids))
    (root / "train_test_split.txt").write_text("".join(f"{i} {trained[i]}\n" for i in ids))
    (root / "classes.txt").write_text("0 Birds\n2 Bald Eagle (Adult)\n17 Tern\n105 Crow\n")
    data = read_data(root, options=ReadOptions(val_fraction=1 / 6))
    assert data.origin["format"] == f"fgvc/{name}"
    assert data.class_names == ["Bald Eagle (Adult)", "Tern", "Crow"]
    assert sizes(data) == (15, 3, 6)
    assert all(trained[path.stem] for path in data.train.paths + data.val.paths)
    for part in (data.train, data.val, data.test):
        assert all(
            {0: 2, 1: 17, 2: 105}[found] == label[path.stem]
            for path, found in zip(part.paths, part.labels, strict=True)
        )


def test_lists_of_dogs_and_flowers(tmp_path):
    dogs = tmp_path / "dogs"
    kinds = ("n1-Pug", "n2-Boxer")
    for split, count in (("train", 6), ("test", 2)):
        files = [f"{kinds[i % 2]}/{split}{i}.jpg" for i in range(count)]
        for file in files:
            picture(dogs / "Images" / file)
        cells = np.array(files, dtype=object)[:, None]
        savemat(
            dogs / f"{split}_list.mat", {"file_list": cells, "labels": np.array([[i % 2 + 1] for i in range(count)])}
        )
    data = read_data(dogs)
    assert (data.origin["format"], data.class_names) == ("fgvc/dogs", list(kinds))
    assert pairs(data.test) == [("test0.jpg", 0), ("test1.jpg", 1)]
    assert sizes(data) == (4, 2, 2)

    flowers = tmp_path / "flowers"
    for i in range(1, 7):
        picture(flowers / f"jpg/image_{i:05d}.jpg", i)
    savemat(flowers / "setid.mat", {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[6, 5, 4]]})
    savemat(flowers / "imagelabels.mat", {"labels": [[1, 2, 2, 1, 2, 1]]})
    data = read_data(flowers)
    assert pairs(data.train) == [("image_00003.jpg", 1), ("image_00001.jpg", 0)]
    assert pairs(data.test) == [("image_00006.jpg", 0), ("image_00005.jpg", 1), ("image_00004.jpg", 0)]
    assert data.class_names == ["1", "2"]


# ------------------------------------------------------------------ VOC 2007
OBJECTS = {  # kind, difficult, width of the square box
    "000001": [("dog", 0, 4), ("person", 0, 9), ("person", 1, 3)],
    "000002": [("car", 1, 9), ("bus", 0, 2)],
    "000003": [("cat", 1, 5)],
    "000004": [("dog", 0, 3), ("dog", 0, 4)],
    "000005": [("sofa", 0, 3)],
}
PARTS = {"train": ["000001", "000002"], "val": ["000003"], "test": ["000004", "000005"]}


def write_voc(root: Path, lists: bool) -> Path:
    folder = root / "VOCdevkit/VOC2007"
    for name, objects in OBJECTS.items():
        picture(folder / f"JPEGImages/{name}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        boxes = "".join(
            f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            f"<xmax>{1 + width}</xmax><ymax>{1 + width}</ymax></bndbox></object>"
            for kind, difficult, width in objects
        )
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    main = folder / "ImageSets/Main"
    main.mkdir(parents=True)
    for split, names in PARTS.items():
        (main / f"{split}.txt").write_text("\n".join(names) + "\n")
        for kind in CLASSES if lists else ():
            marks = {}
            for name in names:
                of_kind = [difficult for each, difficult, _ in OBJECTS[name] if each == kind]
                marks[name] = -1 if not of_kind else 1 if 0 in of_kind else 0
            (main / f"{kind}_{split}.txt").write_text("".join(f"{n} {m:2d}\n" for n, m in marks.items()))
    return root


@pytest.mark.parametrize("lists", [True, False])
def test_voc_has_several_labels_and_difficult_ones(tmp_path, lists):
    """From the lists of the challenge, and the same from the annotations."""
    data = read_data(write_voc(tmp_path, lists))
    assert (data.task, data.origin["format"], len(data.class_names)) == ("multilabel", "voc2007", 20)

    def kinds(label, value):
        return {CLASSES[i] for i in (label == value).nonzero()[:, 0]}

    found = [label for part in (data.train, data.val, data.test) for label in part.labels]
    assert [kinds(label, 1) for label in found] == [{"dog", "person"}, {"bus"}, set(), {"dog"}, {"sofa"}]
    assert [kinds(label, -1) for label in found] == [set(), {"car"}, {"cat"}, set(), set()]


def test_voc_with_one_label(tmp_path):
    root = write_voc(tmp_path, lists=False)
    data = read_data(root, "voc2007/single")
    labels = [CLASSES[label] for part in (data.train, data.val, data.test) for label in part.labels]
    assert labels == ["person", "bus", "cat", "dog", "sofa"]  # the largest, of those that are not difficult
    assert (data.task, data.origin["labels"]) == ("classification", "the object with the largest box")
    picture(root / "train/a.jpg")
    (root / "train2mmcls.txt").write_text("train/a.jpg 19\n" * 8)
    (root / "test2mmcls.txt").write_text("train/a.jpg 0\n")
    own = read_data(root, "voc2007/single")
    assert (sizes(own), own.test.labels, own.origin["labels"]) == (
        (7, 1, 1),
        [0],
        "from train2mmcls.txt, test2mmcls.txt",
    )


def test_wrong_voc_folders(tmp_path):
    with pytest.raises(ValueError, match=r"is no VOC 2007; expected VOCdevkit/VOC2007"):
        read_data(tmp_path, "voc2007")
    root = write_voc(tmp_path, lists=False)
    (root / "VOCdevkit/VOC2007/Annotations/000003.xml").unlink()
    with pytest.raises(ValueError, match=r"000003\.xml is missing"):
        read_data(root)
    with pytest.raises(ValueError, match="no variant 'double'; it has voc2007/single"):
        read_data(root, "voc2007/double")
