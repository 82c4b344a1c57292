"""Every format of clouds on a miniature of its real layout: clouds, labels and parts, and what wrong layouts say."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch
from cloud_folders import ball, write_cloud_splits, write_clouds

from deltalens.data import ReadOptions, TrainingSubset, read_data, read_part
from deltalens.data.array_pickles import read_arrays
from deltalens.data.formats import recognise
from deltalens.data.scanobjectnn import CLASS_NAMES

RANDOM = np.random.default_rng(0)


def sizes(data) -> tuple[int, ...]:
    return tuple(0 if part is None else len(part) for part in (data.train, data.val, data.test))


# ------------------------------------------------------------------ class folders
def test_folders_with_parts(tmp_path):
    data = read_data(write_cloud_splits(tmp_path, 3, 2, 1))
    assert data.origin == {"format": "points-folder", "kind": "points"}
    assert (data.class_names, sizes(data)) == (["flat", "long", "round"], (9, 6, 3))
    cloud, label = data.train[0]
    assert (cloud.shape, cloud.dtype, label) == ((80, 3), torch.float32, 0)
    assert np.array_equal(cloud.numpy(), np.load(tmp_path / "train/flat/000.npy"))
    assert sizes(read_data(tmp_path, "points-folder", protocol="trainval")) == (15, 0, 3)


def test_folders_are_split_by_seed_and_evaluate_reads_the_same(tmp_path):
    root = write_clouds(tmp_path, 20)
    data = read_data(root, options=ReadOptions(val_fraction=0.2, test_fraction=0.1, seed=3))
    assert sizes(data) == (42, 12, 6)
    assert np.bincount(data.val.labels).tolist() == [4, 4, 4]
    again = read_part(root, "test", ["round", "flat", "long"], data.origin)
    assert again.paths == data.test.paths
    assert {label for path, label in zip(again.paths, again.labels, strict=True) if path.parent.name == "round"} == {0}
    assert len(read_part(root, "all", data.class_names, data.origin)) == 60
    other = read_data(root, options=ReadOptions(val_fraction=0.2, test_fraction=0.1, seed=4))
    assert other.test.paths != data.test.paths


def test_shots_fractions_and_halves_of_the_classes(tmp_path):
    root = write_cloud_splits(tmp_path, 6, 2, 2)
    few = read_data(root, options=ReadOptions(shots=2, subset="base"))
    assert (few.class_names, sizes(few)) == (["flat", "long"], (4, 4, 4))
    assert few.origin["shots"] == 2
    half = TrainingSubset(0.5).take(read_data(root))
    assert np.bincount(half.train.labels).tolist() == [3, 3, 3]


def test_modelnets_own_tree(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for kind in ("bed", "sofa"):
            folder = tmp_path / kind / part
            folder.mkdir(parents=True)
            for i in range(count):
                corners = "".join(f"{x} {y} {z}\n" for x, y, z in RANDOM.random((3, 3)))
                (folder / f"{kind}_{i:04d}.off").write_text(f"OFF\n3 1 0\n{corners}3 0 1 2\n")
    data = read_data(tmp_path)
    assert (data.class_names, sizes(data)) == (["bed", "sofa"], (6, 2, 4))
    assert {path.parent.name for path in data.test.paths} == {"test"}


def test_broken_clouds_are_named_or_left_out(tmp_path, capsys):
    root = write_cloud_splits(tmp_path, 4, 2, 2)
    np.save(root / "train/flat/000.npy", np.full((5, 3), np.nan))
    (root / "train/long/001.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 12 clouds cannot be read: .*flat/000\.npy: 5 of 5 points are NaN"):
        read_data(root)
    assert sizes(read_data(root, options=ReadOptions(skip_broken=True))) == (10, 6, 6)
    assert "left out 2 of 12 clouds" in capsys.readouterr().out


def test_folders_that_are_no_clouds(tmp_path):
    write_cloud_splits(tmp_path / "a", 2, 1, 1)
    (tmp_path / "a/test/flat").rename(tmp_path / "a/test/thin")
    with pytest.raises(ValueError, match="only in test: thin"):
        read_data(tmp_path / "a")
    (tmp_path / "b/one").mkdir(parents=True)
    (tmp_path / "b/two").mkdir()
    with pytest.raises(ValueError, match=r"class folders without clouds in .*one, two; expected one folder per class"):
        read_data(tmp_path / "b", "points-folder")
    assert recognise(tmp_path / "b") is None
    with pytest.raises(FileNotFoundError, match="no data folder"):
        read_data(tmp_path / "c", "points-folder")


# ------------------------------------------------------------------ ScanObjectNN
class StandInFile(dict):
    """What is used of an h5py.File: named arrays and a context."""

    def __init__(self, path, mode):
        assert mode == "r"
        with np.load(open(path, "rb")) as arrays:
            super().__init__(arrays)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(params=["h5py", "stand-in"])
def write_h5(request, monkeypatch):
    """(path, arrays) -> a file that the format reads: with h5py, or where that is not installed with a stand-in."""
    if request.param == "h5py":
        h5py = pytest.importorskip("h5py")

        def write(path, **arrays):
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                for name, values in arrays.items():
                    file[name] = values

        return write
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=StandInFile))

    def write(path, **arrays):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:
            np.savez(stream, **arrays)

    return write


def scans(count: int) -> dict[str, np.ndarray]:
    labels = np.arange(count) % 15
    return {"data": RANDOM.random((count, 32, 3)).astype(np.float32), "label": labels, "mask": np.zeros(count)}


def test_scanobjectnn(tmp_path, write_h5):
    hard, only = (scans(60), scans(30)), (scans(45), scans(15))
    for part, of_hard, of_only in zip(("training", "test"), hard, only, strict=True):
        write_h5(tmp_path / f"main_split/{part}_objectdataset_augmentedrot_scale75.h5", **of_hard)
        write_h5(tmp_path / f"main_split_nobg/{part}_objectdataset.h5", **of_only)
    assert recognise(tmp_path) == "scanobjectnn"
    with pytest.raises(ValueError, match="name the variant: scanobjectnn/bg, scanobjectnn/only"):
        read_data(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"main_split/training_objectdataset\.h5; expected"):
        read_data(tmp_path, "scanobjectnn/bg")
    data = read_data(tmp_path, "scanobjectnn/hardest", options=ReadOptions(val_fraction=0.25))
    assert (data.class_names, sizes(data)) == (list(CLASS_NAMES), (45, 15, 30))
    assert data.origin["val"] == "split off train"
    assert np.array_equal(data.test[20][0].numpy(), hard[1]["data"][20])
    assert data.test[20][1] == 20 % 15
    assert sizes(read_data(tmp_path / "main_split_nobg")) == (30, 15, 15)  # the one variant there
    assert len(read_part(tmp_path, "val", data.class_names, data.origin)) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((30, 32))}, r"data \(30, 32\) and label \(30,\); expected \(clouds, points, 3\)"),
        ({"label": np.full(30, 15)}, "labels other than 0 to 14"),
        ({"data": None}, "it has no dataset data, but label"),
        ({"data": np.full((30, 32, 3), np.nan, np.float32)}, r"30 of 30 clouds .*h5\[0\]: 32 of 32 points are NaN"),
    ],
)
def test_scans_of_another_kind(tmp_path, write_h5, change, message):
    arrays = {name: values for name, values in ({**scans(30), **change}).items() if values is not None}
    for part in ("training", "test"):
        write_h5(tmp_path / f"main_split/{part}_objectdataset.h5", **arrays)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path)


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for part in ("training", "test"):
        (tmp_path / "main_split").mkdir(exist_ok=True)
        (tmp_path / f"main_split/{part}_objectdataset.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r'pip install "deltalens\[points\]"'):
        read_data(tmp_path)


# ------------------------------------------------------------------ ModelNet
NAMES = ["airplane", "night_stand"]


def write_modelnet(root, classes: int = 40):
    """Four training and two test shapes of two classes, as text."""
    (root / f"modelnet{classes}_shape_names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for part, numbers in (("train", range(1, 5)), ("test", range(5, 7))):
        shapes = [f"{name}_{number:04d}" for name in NAMES for number in numbers]
        (root / f"modelnet{classes}_{part}.txt").write_text("\n".join(shapes) + "\n")
        for shape in shapes:
            folder = root / shape[:-5]
            folder.mkdir(exist_ok=True)
            np.savetxt(folder / f"{shape}.txt", RANDOM.random((12, 6)), delimiter=",", fmt="%.6f")
    return root


def write_cache(root, part: str, count: int, points: int = 16, protocol: int = 4, classes: int = 40) -> list:
    clouds = [RANDOM.random((points, 6)).astype(np.float32) for _ in range(count)]
    labels = [np.array([i % 2]).astype(np.int32) for i in range(count)]
    with open(root / f"modelnet{classes}_{part}_{points}pts_fps.dat", "wb") as stream:
        pickle.dump([clouds, labels], stream, protocol=protocol)
    return clouds


@pytest.mark.parametrize("classes", [10, 40])
def test_modelnet_as_text(tmp_path, classes):
    root = write_modelnet(tmp_path, classes)
    data = read_data(root)
    assert data.origin["format"] == f"modelnet{classes}"
    assert (data.class_names, sizes(data)) == (NAMES, (6, 2, 4))
    assert [path.stem for path in data.test.paths[2:]] == ["night_stand_0005", "night_stand_0006"]
    assert data.test.labels == [0, 0, 1, 1]
    wanted = np.loadtxt(root / "night_stand/night_stand_0006.txt", delimiter=",", dtype=np.float32)[:, :3]
    assert np.array_equal(data.test[3][0].numpy(), wanted)
    (root / "airplane/airplane_0002.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of the 8 images listed in .*_train\.txt are missing|airplane_0002"):
        read_data(root)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_modelnets_caches(tmp_path, protocol):
    root = write_modelnet(tmp_path)
    write_cache(root, "train", 10, 8)
    write_cache(root, "train", 12, 16, protocol)
    clouds = write_cache(root, "test", 4, 16, protocol)
    data = read_data(root)
    assert (data.class_names, sizes(data)) == (NAMES, (10, 2, 4))
    assert np.array_equal(data.test[1][0].numpy(), clouds[1][:, :3])
    assert data.test.labels == [0, 1, 0, 1]
    assert sizes(read_data(root, "modelnet40/txt")) == (6, 2, 4)
    with pytest.raises(FileNotFoundError, match="no caches of modelnet10"):
        read_data(root, "modelnet10/cached")


class Unwanted:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", [Unwanted(), np.array([Unwanted()], dtype=object)])
def test_a_cache_that_asks_for_something_else(tmp_path, content, capsys):
    file = tmp_path / "x.dat"
    file.write_bytes(pickle.dumps([content]))
    with pytest.raises(ValueError, match=r"x\.dat asks for builtins\.print, and may not"):
        read_arrays(file)
    assert not capsys.readouterr().out
    file.write_bytes(b"\x80\x04nothing")
    with pytest.raises(ValueError, match=r"x\.dat cannot be read"):
        read_arrays(file)
    file.write_bytes(pickle.dumps({"a": [np.float32(2), (np.arange(3),)]}))
    assert read_arrays(file)["a"][1][0].tolist() == [0, 1, 2]


# ------------------------------------------------------------------ few-shot folds
@pytest.mark.parametrize("folder", ["2way_10shot", "2way10shot"])
def test_few_shot_folds(tmp_path, folder):
    items = [(ball(RANDOM, "round", 12), np.array([3 * (i % 2)]), i) for i in range(20)]
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "7.pkl").write_bytes(pickle.dumps({"train": items, "test": items[:6]}))
    data = read_data(tmp_path, "points-few-shot/2way_10shot/7", options=ReadOptions(val_fraction=0.2))
    assert (data.class_names, sizes(data)) == (["0", "3"], (16, 4, 6))
    assert np.array_equal(data.test[5][0].numpy(), items[5][0])
    assert data.test.labels == [0, 1] * 3
    assert sizes(read_data(tmp_path, data.origin["format"], protocol="trainval")) == (20, 0, 6)
    with pytest.raises(ValueError, match="wants a fold, got ''"):
        read_data(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2way_10shot/8\.pkl or .*2way10shot/8\.pkl"):
        read_data(tmp_path, "points-few-shot/2way10shot/8")
    for wrong, message in (
        ({"train": []}, "no lists called train and test"),
        ({"train": [1], "test": []}, "no list of"),
    ):
        (tmp_path / folder / "9.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_data(tmp_path, "points-few-shot/2way10shot/9")


def test_unknown_variants(tmp_path):
    root = write_cloud_splits(tmp_path, 4, 2, 2)
    with pytest.raises(ValueError, match="the format points-folder has no variant 'x'"):
        read_data(root, "points-folder/x")
    with pytest.raises(ValueError, match="the format modelnet40 has no variant 'y'"):
        read_data(root, "modelnet40/y")
    with pytest.raises(ValueError, match=r"did you mean modelnet(40|10)"):
        read_data(root, "modelnet4")
