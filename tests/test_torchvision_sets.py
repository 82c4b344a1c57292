"""torchvision's sets on miniatures of their folders, read through torchvision's own classes."""

import csv
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from deltalens.data import ReadOptions, read_data, read_part
from deltalens.data.memory import ImagesInMemory, keep_in_memory
from deltalens.data.torchvision_sets import SETS

HALF = ReadOptions(val_fraction=0.5, test_fraction=0.25)


def picture(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (value, 0, 0)).save(file, **({"quality": 100} if file.suffix == ".jpg" else {}))


def red(part) -> list[tuple[int, int]]:
    """(value that was drawn, label): shows that an image goes with its label."""
    return [(round(np.asarray(part.image(i))[0, 0, 0] / 10), part.labels[i]) for i in range(len(part))]


@pytest.mark.parametrize("name", SETS)
def test_the_classes_take_our_arguments(name):
    """Checked against the installed torchvision: names, keywords, and the splits themselves."""
    kind = getattr(torchvision.datasets, name)
    parameters = inspect.signature(kind.__init__).parameters
    source = inspect.getsource(kind)
    for arguments in SETS[name].values():
        for key, value in arguments.items():
            assert key in parameters
            assert isinstance(value, bool) or f'"{value}"' in source
    if "split" not in parameters and "train" not in parameters:
        assert SETS[name] == {"all": {}}


# ------------------------------------------------------------------ miniatures
def flowers102(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    for i in range(1, 7):
        picture(root / f"flowers-102/jpg/image_{i:05d}.jpg", 10 * i)
    savemat(root / "flowers-102/setid.mat", {"trnid": [[3, 1]], "valid": [[2, 4]], "tstid": [[6, 5]]})
    savemat(root / "flowers-102/imagelabels.mat", {"labels": [[1, 2, 2, 1, 2, 1]]})
    return {"train": [(3, 1), (1, 0)], "val": [(2, 1), (4, 0)], "test": [(6, 0), (5, 1)]}, "pink primrose"


def pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    rows = {"trainval": [("Bengal_1", 1), ("Bengal_2", 1), ("pug_1", 2), ("pug_2", 2)], "test": [("pug_3", 2)]}
    (base / "annotations").mkdir(parents=True)
    for split, entries in rows.items():
        (base / f"annotations/{split}.txt").write_text("".join(f"{name} {label} 1 1\n" for name, label in entries))
        for name, label in entries:
            picture(base / f"images/{name}.jpg", 10 * (label + int(name[-1])))
    return {"train": 2, "val": 2, "test": [(5, 1)]}, "Bengal"


def dtd(root, monkeypatch):
    for split in ("train", "val", "test"):
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(f"dotted/{split}.jpg\nlaced/{split}.jpg\n")
        for i, kind in enumerate(("dotted", "laced")):
            picture(root / f"dtd/dtd/images/{kind}/{split}.jpg", 30 + 10 * i)
    return {split: [(3, 0), (4, 1)] for split in ("train", "val", "test")}, "dotted"


def cars(root, monkeypatch):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["AM General", "Acura"], dtype=object)})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        kind = [("fname", object), ("class", np.uint8)]
        annotations = np.array([(f"{i}.jpg", 1 + i % 2) for i in range(4)], dtype=kind)
        savemat(base / file, {"annotations": annotations})
        for i in range(4):
            picture(base / f"cars_{split}/{i}.jpg", 10 * (1 + i))
    return {"train": 2, "val": 2, "test": [(1, 0), (2, 1), (3, 0), (4, 1)]}, "AM General"


def food(root, monkeypatch):
    for split in ("train", "test"):
        entries = {kind: [f"{kind}/{split}{i}" for i in range(2)] for kind in ("ramen", "pho")}
        (root / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(entries))
        for names in entries.values():
            for name in names:
                picture(root / f"food-101/images/{name}.jpg", 10 + 10 * ("ramen" in name))
    return {"train": 2, "val": 2, "test": [(2, 1), (2, 1), (1, 0), (1, 0)]}, "pho"


def eurosat(root, monkeypatch):
    for i, kind in enumerate(("Forest", "River")):
        for number in range(4):
            picture(root / f"eurosat/2750/{kind}/{kind}_{number}.jpg", 50 + 10 * i)
    return {"train": 2, "val": 4, "test": [(5, 0), (6, 1)]}, "Forest"


def caltech101(root, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.Caltech101, "_check_integrity", lambda _: True)
    for i, kind in enumerate(("BACKGROUND_Google", "accordion", "ant")):
        for number in range(1, 5):
            picture(root / f"caltech101/101_ObjectCategories/{kind}/image_{number:04d}.jpg", 10 * i)
    return {"train": 2, "val": 4, "test": [(1, 0), (2, 1)]}, "accordion"


def sun397(root, monkeypatch):
    base = root / "SUN397"
    base.mkdir()
    (base / "ClassName.txt").write_text("/a/abbey\n/b/bar/inside\n")
    for i, kind in enumerate(("a/abbey", "b/bar/inside")):
        for number in range(4):
            picture(base / kind / f"sun_{number}.jpg", 10 * (i + 7))
    return {"train": 2, "val": 4, "test": [(7, 0), (8, 1)]}, "abbey"


def cifar10(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    base = root / "cifar-10-batches-py"
    base.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        data = np.concatenate([np.full((2, 1024), 90), np.zeros((2, 2048))], 1).astype(np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    return {"train": 6, "val": 4, "test": [(9, 0), (9, 1)]}, "airplane"


def svhn(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        pixels = np.zeros((32, 32, 3, 4), np.uint8)
        pixels[:, :, 0] = [10, 20, 10, 20]
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [10], [1]], np.uint8)})
    return {"train": 2, "val": 2, "test": [(1, 0), (2, 1), (1, 0), (2, 1)]}, "0"


def gtsrb(root, monkeypatch):
    base = root / "gtsrb"
    for label in range(2):
        for i in range(2):
            picture(base / f"GTSRB/Training/{label:05d}/{i}.ppm", 10 * label)
    with open(base / "GT-final_test.csv", "w") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerows([["Filename", "ClassId"], ["0.ppm", 1], ["1.ppm", 0]])
    for i in range(2):
        picture(base / f"GTSRB/Final_Test/Images/{i}.ppm", 10 * (1 - i))
    return {"train": 2, "val": 2, "test": [(1, 1), (0, 0)]}, "0"


def country211(root, monkeypatch):
    for split in ("train", "valid", "test"):
        for i, kind in enumerate(("AD", "AE")):
            picture(root / f"country211/{split}/{kind}/0.jpg", 20 + 10 * i)
    return {split: [(2, 0), (3, 1)] for split in ("train", "val", "test")}, "AD"


MINIATURES = {
    "CIFAR10": cifar10,
    "Caltech101": caltech101,
    "Country211": country211,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers102": flowers102,
    "Food101": food,
    "GTSRB": gtsrb,
    "OxfordIIITPet": pets,
    "SUN397": sun397,
    "SVHN": svhn,
    "StanfordCars": cars,
}


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures(name, tmp_path, monkeypatch):
    """Official parts as they are; the others, given by their number, drawn by seed, every class in each."""
    expected, first = MINIATURES[name](tmp_path, monkeypatch)
    data = read_data(tmp_path, f"torchvision/{name}", options=HALF)
    assert data.class_names[0] == first
    for split, wanted in expected.items():
        part = getattr(data, split)
        if isinstance(wanted, int):
            assert len(part) == wanted
            assert np.ptp(np.bincount(part.labels)) <= 1
        else:
            assert red(part) == wanted
    again = read_part(tmp_path, "val", data.class_names, data.origin)
    assert red(again) == red(data.val)


def test_a_split_does_not_follow_the_order_of_the_file_system(tmp_path, monkeypatch):
    sun397(tmp_path, monkeypatch)
    for i, file in enumerate(sorted((tmp_path / "SUN397").rglob("*.jpg"))):
        picture(file, 20 * i)
    first = red(read_data(tmp_path, "torchvision/SUN397", options=HALF).train)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert red(read_data(tmp_path, "torchvision/SUN397", options=HALF).train) == first


def test_items_behave_as_files_do(tmp_path, monkeypatch):
    dtd(tmp_path, monkeypatch)
    data = read_data(tmp_path, "torchvision/DTD", protocol="trainval")
    assert (data.val, data.train.labels) == (None, [0, 1, 0, 1])
    part = data.train.subset([1, 2])
    part.transform, part.mode = lambda image: image.size, "L"
    assert (part[0], part.image(0).mode) == (((6, 6), 1), "L")
    kept = keep_in_memory(part, lambda image: image)
    assert isinstance(kept, ImagesInMemory)
    assert (kept.images[0].shape, kept.labels) == ((1, 6, 6), [1, 0])
    assert red(pickle.loads(pickle.dumps(data.train))) == red(data.train)  # loader processes are sent it


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"torchvision finds no DTD in .*Dataset not found.*--download true"):
        read_data(tmp_path, "torchvision/DTD")
    with pytest.raises(ValueError, match=r"unknown torchvision set 'Flower102'.* Flowers102"):
        read_data(tmp_path, "torchvision/Flower102")
    with pytest.raises(ValueError, match="torchvision/<Name>"):
        read_data(tmp_path, "torchvision")


def test_download_is_passed_on(tmp_path, monkeypatch):
    asked = []

    class Fake(torchvision.datasets.VisionDataset):
        def __init__(self, root, split="train", download=False):
            asked.append((split, download))
            raise RuntimeError("no network here")

    monkeypatch.setattr(torchvision.datasets, "Food101", Fake)
    for download in (False, True):
        with pytest.raises(ValueError, match="no network here"):
            read_data(tmp_path, "torchvision/Food101", options=ReadOptions(download=download))
    assert asked == [("train", False), ("train", True)]
