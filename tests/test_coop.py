"""CoOp's datasets on miniatures of their layouts, and their stored few-shot splits."""

import json
import os
import pickle
import shutil

import pytest
import torch
from coop_folders import (
    WNIDS,
    write_aircraft,
    write_class_names,
    write_imagenet,
    write_pickle,
    write_split_file,
)
from reference import SHARED
from test_formats import pairs, picture, sizes

from deltalens.data import ReadOptions, read_data, read_part
from deltalens.data.coop import SETS, set_name
from deltalens.data.coop_imagenet import NAMES
from deltalens.data.few_shot import few_shot
from deltalens.training import fit

SPLIT_FILES = [name for name, each in SETS.items() if each.file.startswith("split_zhou")]


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_datasets_with_a_split_file(tmp_path, name):
    known = SETS[name]
    folder = write_split_file(tmp_path / "sets" / name, known.file, known.images, flat=name == "oxford_flowers")
    for root, format in ((tmp_path / "sets", f"coop/{name}"), (folder, f"coop/{name}"), (folder, "auto")):
        data = read_data(root, format)
        assert sizes(data) == (15, 9, 6)
        assert data.class_names == ["ant eater", "Big Cat", "cow"]  # labels and order of the file, names for a prompt
        assert data.train.labels == [0, 1, 2] * 5
        assert data.train.paths[0].is_relative_to(folder / known.images)
        assert (data.origin["format"], data.origin["published_sizes"]) == (f"coop/{name}", False)
        assert data.train[4][0].size == (10, 8)
    (folder / known.file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file .*\n    .*{name}/{known.file}\n"):
        read_data(tmp_path / "sets", f"coop/{name}")


def test_there_are_fifteen_sets():
    assert len(SETS) == 15
    assert [set_name(name) for name in ("Food101", "imagenet_a", "ImageNet-R", "StanfordCars", "mnist")] == [
        "food-101", "imagenet-adversarial", "imagenet-rendition", "stanford_cars", None
    ]  # fmt: skip


def test_folders_of_other_names(tmp_path):
    """A dataset's own folder may be called anything, and a folder of all of them may use CoOp's other names."""
    own = write_split_file(tmp_path / "elsewhere/pictures", "split_zhou_Caltech101.json", "101_ObjectCategories")
    assert read_data(own, "coop/caltech-101").origin["format"] == "coop/caltech-101"
    write_split_file(tmp_path / "sets/Caltech101", "split_zhou_Caltech101.json", "101_ObjectCategories")
    assert sizes(read_data(tmp_path / "sets", "coop/caltech101")) == (15, 9, 6)
    inside = write_split_file(tmp_path / "sets/sun397", "split_zhou_SUN397.json", "SUN397")  # a folder in its namesake
    assert sizes(read_data(inside, "coop/sun397")) == (15, 9, 6)


def test_any_split_file(tmp_path):
    folder = write_split_file(tmp_path, "split_zhou_Zoo.json", "pictures")
    for format in ("coop", "auto"):
        data = read_data(folder, format)
        assert (data.origin, sizes(data)) == ({"format": "coop"}, (15, 9, 6))
    (folder / "split_zhou_Other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has 2 files split_zhou_\*\.json \(split_zhou_Other"):
        read_data(folder, "coop")


def test_aircraft(tmp_path):
    folder = write_aircraft(tmp_path / "fgvc_aircraft")
    for root, format in ((tmp_path, "coop/fgvc_aircraft"), (folder, "auto")):
        data = read_data(root, format)
        assert data.class_names == ["707-320", "Spitfire", "Cessna 172"]  # the order of variants.txt
        assert (sizes(data), data.test.labels) == ((15, 9, 6), [0, 1, 2, 0, 1, 2])
    (folder / "images_variant_val.txt").write_text("0000001 707\n")
    with pytest.raises(ValueError, match=r"line 1 of .*images_variant_val.txt has the variant '707', which variants"):
        read_data(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["train"][0].__setitem__(1, "0"), r"item 1 of train in .* is \['ant_eater.*not \[path, label"),
        (lambda d: d.pop("val"), "has no list val; it needs train, val and test"),
        (lambda d: [row.__setitem__(1, 7) for part in d.values() for row in part if row[1] == 1], "none is 1; labels"),
        (
            lambda d: d["test"][0].__setitem__(2, "anteater"),
            "calls label 0 'ant_eater' and, for .* in test, 'anteater'",
        ),
        (lambda d: d.update(train=[r for r in d["train"] if r[1] < 2]), "no training images for 1 of its 3 .*: cow"),
        (lambda d: d["test"].append(["gone.jpg", 0, "ant_eater"]), r"1 of the 7 images listed in .*json are missing"),
    ],
)
def test_wrong_split_files(tmp_path, spoil, message):
    folder = write_split_file(tmp_path / "dtd", "split_zhou_DescribableTextures.json", "images")
    file = folder / "split_zhou_DescribableTextures.json"
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, "coop/dtd")


def test_unknown_sets_and_missing_folders(tmp_path):
    with pytest.raises(
        ValueError, match="'mnist' is no dataset of CoOp's; write coop/<dataset> with imagenet, caltech"
    ):
        read_data(tmp_path, "coop/mnist")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no data folder at .*dtd; expected .*dtd/split_zhou_Desc.*/images/"
    ):
        read_data(tmp_path, "coop/dtd")
    with pytest.raises(ValueError, match="has 0 files split_zhou"):
        read_data(tmp_path, "coop")


# ------------------------------------------------------------------ ImageNet and its variants
def test_imagenet(tmp_path):
    folder = write_imagenet(tmp_path / "imagenet")
    for root, format in ((tmp_path, "coop/imagenet"), (folder, "auto")):
        data = read_data(root, format)
        assert (sizes(data), data.val) == ((24, 0, 4), None)  # the part called val is the test part
        assert data.class_names == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert data.train.paths == sorted(data.train.paths)  # whatever order the file system gives
    sampled = read_data(folder, options=ReadOptions(shots=2, shots_seed=1))
    positions, _ = few_shot([label for label in range(4) for _ in range(6)], None, 2, 1)
    assert sampled.train.paths == [data.train.paths[i] for i in positions]  # of the sorted listing
    assert sizes(sampled) == (8, 0, 4)
    with pytest.raises(ValueError, match="no val part to train on"):
        read_data(folder, protocol="trainval")
    shutil.rmtree(folder / "images/val/n01443537")
    with pytest.raises(ValueError, match="have other class folders: n01443537"):
        read_data(folder)


def test_imagenet_in_the_order_of_a_stored_list(tmp_path):
    """Where CoOp's code left preprocessed.pkl, its order of files decides what a seed draws."""
    folder = write_imagenet(tmp_path / "imagenet")
    listed = [(f"{wnid}/{wnid}_{i}.JPEG", label) for label, wnid in enumerate(WNIDS) for i in (3, 5, 0, 2, 4, 1)]
    items = [(f"/home/other/data/imagenet/images/train/{path}", label, "x") for path, label in listed]
    write_pickle(folder / "preprocessed.pkl", {"train": items, "test": []})
    data = read_data(folder, options=ReadOptions(shots=2, shots_seed=1))
    positions, _ = few_shot([label for _, label in listed], None, 2, 1)
    assert [path.name for path in data.train.paths] == [listed[i][0].split("/")[1] for i in positions]
    assert data.origin["shots_from"] == "drawn in the order of preprocessed.pkl"
    assert pairs(read_part(folder, "train", data.class_names, data.origin)) == pairs(data.train)
    anew = read_data(folder, options=ReadOptions(shots=2, shots_seed=1, stored_shots=False))
    assert (anew.origin["shots_from"], pairs(anew.train) == pairs(data.train)) == ("drawn", False)
    assert pairs(read_part(folder, "train", anew.class_names, anew.origin)) == pairs(anew.train)


def test_variants_of_imagenet(tmp_path):
    write_class_names(tmp_path / "imagenet")
    for label in range(4):
        picture(tmp_path / f"imagenetv2/imagenetv2-matched-frequency-format-val/{label}/a.jpeg", label)
    for wnid in WNIDS:
        picture(tmp_path / f"imagenet-sketch/images/{wnid}/b.JPEG")
    for variant, images in (("imagenet-adversarial", "imagenet-a"), ("imagenet-rendition", "imagenet-r")):
        for wnid in ("n01491361", "n01443537"):  # some of the classes
            picture(tmp_path / variant / images / wnid / "c.jpg")
        (tmp_path / variant / images / "README.txt").write_text("")
    names = ["tench", "goldfish", "great white shark", "tiger shark"]
    for variant, wanted in (("imagenetv2", names), ("imagenet-sketch", names)):
        data = read_data(tmp_path, f"coop/{variant}")
        assert (data.class_names, data.test.labels, sizes(data)) == (wanted, [0, 1, 2, 3], (0, 0, 4))
    for variant in ("imagenet-adversarial", "imagenet-rendition"):
        data = read_data(tmp_path / variant)  # found by the names of the folders
        assert data.origin["format"] == f"coop/{variant}"
        assert (data.class_names, data.test.labels) == (["goldfish", "tiger shark"], [0, 1])
        assert [path.parent.name for path in data.test.paths] == ["n01443537", "n01491361"]
        assert read_part(tmp_path / variant, "test", names).labels == [1, 3]  # labels of a model of all classes
    with pytest.raises(ValueError, match="has no train part here; it has test"):
        read_part(tmp_path / variant, "train", names)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(torch.nn.Identity(), data)
    assert read_data(tmp_path, "coop/imagenetv2", options=ReadOptions(shots=4, subset="base")).test.labels == [0, 1]


def test_class_names_of_imagenet(tmp_path):
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / NAMES).rename(tmp_path / NAMES)
    assert read_data(folder, "coop/imagenet").class_names[3] == "tiger shark"  # from the folder above
    (tmp_path / NAMES).write_text("n01440764 tench\nn01443537\n")
    with pytest.raises(ValueError, match=r"line 2 of .*classnames.txt is 'n01443537', not a WordNet id and a name"):
        read_data(folder, "coop/imagenet")
    (tmp_path / NAMES).write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match=r"3 class folders that classnames\.txt does not name: n01443537"):
        read_data(folder, "coop/imagenet")
    (tmp_path / NAMES).unlink()
    with pytest.raises(FileNotFoundError, match=r"take it from CoOp's DATASETS.md .* put it into .*imagenet or"):
        read_data(folder, "coop/imagenet")
    write_class_names(folder)
    shutil.rmtree(folder / "images/train")
    with pytest.raises(FileNotFoundError, match=r"(?s)no folder .*images/train; expected .*imagenet/classnames.txt"):
        read_data(folder, "coop/imagenet")


def test_numbered_folders_go_with_the_names(tmp_path):
    write_class_names(tmp_path / "imagenetv2")
    place = tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val"
    for label in (0, 1, 3):
        picture(place / str(label) / "a.jpeg")
    with pytest.raises(ValueError, match=r"lacks the class folders 2; classnames\.txt has 4 lines"):
        read_data(tmp_path, "coop/imagenetv2")
    picture(place / "2/a.jpeg")
    picture(place / "17/a.jpeg")
    with pytest.raises(ValueError, match="also has the class folders 17"):
        read_data(tmp_path, "coop/imagenetv2")


# ------------------------------------------------------------------ stored few-shot splits
STORED = "split_fewshot/shot_2-seed_1.pkl"
CHOSEN = {"train": [("cow/train3.jpg", 2), ("ant_eater/train4.jpg", 0)], "val": [("cow/val2.jpg", 2)]}


def write_stored(folder, chosen=CHOSEN, root="/mnt/d/data/pets/images"):
    lists = {part: [(f"{root}/{path}", label, "x") for path, label in items] for part, items in chosen.items()}
    write_pickle(folder / STORED, lists)
    return folder


@pytest.mark.parametrize("root", ["/mnt/d/data/oxford_pets/images", "D:\\data\\oxford_pets\\images", "./data"])
def test_a_stored_split_is_used(tmp_path, root):
    folder = write_split_file(tmp_path / "oxford_pets", "split_zhou_OxfordPets.json", "images")
    write_stored(folder, root=root)
    options = ReadOptions(shots=2, shots_seed=1)
    data = read_data(folder, options=options)
    assert pairs(data.train) == [("train3.jpg", 2), ("train4.jpg", 0)]
    assert data.train.paths[1] == folder / "images/ant_eater/train4.jpg"  # here, not where it was written
    assert (pairs(data.val), len(data.test)) == ([("val2.jpg", 2)], 6)
    assert data.origin["shots_from"] == STORED
    assert pairs(read_part(folder, "train", data.class_names, data.origin)) == pairs(data.train)
    anew = read_data(folder, options=ReadOptions(shots=2, shots_seed=1, stored_shots=False))
    assert (sizes(anew), anew.origin["shots_from"]) == ((6, 6, 6), "drawn")
    base = read_data(folder, options=ReadOptions(shots=2, shots_seed=1, subset="base"))
    assert (pairs(base.train), base.origin["class_subset"]) == ([("train4.jpg", 0)], "base")
    assert pairs(read_part(folder, "train", base.class_names, base.origin)) == pairs(base.train)
    assert read_data(folder, options=ReadOptions(shots=2, shots_seed=2)).origin["shots_from"] == "drawn"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (CHOSEN | {"val": [("cow/train0.jpg", 2)]}, "cow/train0.jpg, which is not in the val part here"),
        (CHOSEN | {"train": [("cow/train0.jpg", 1)]}, "cow/train0.jpg with 1, and here it has 2"),
        ({"train": CHOSEN["train"]}, "has no list val, but train; remove it, or pass stored_shots=False"),
    ],
)
def test_a_stored_split_of_other_data(tmp_path, chosen, message):
    folder = write_split_file(tmp_path / "oxford_pets", "split_zhou_OxfordPets.json", "images")
    write_stored(folder, chosen)
    with pytest.raises(ValueError, match=message):
        read_data(folder, options=ReadOptions(shots=2, shots_seed=1))


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_pickle_runs_nothing(tmp_path):
    folder = write_split_file(tmp_path / "oxford_pets", "split_zhou_OxfordPets.json", "images")
    options = ReadOptions(shots=2, shots_seed=1)
    write_stored(folder)
    for content, message in (
        (pickle.dumps({"train": [Evil(tmp_path / "made")], "val": []}), r"asks for posix\.mkdir, and may only hold"),
        (pickle.dumps({"train": [torch.Size([1])]}), r"asks for torch\.Size"),
        (pickle.dumps({"train": [("a.jpg", 1)], "val": []}), "holds no lists of Datum"),
        (pickle.dumps([1, 2]), "holds no lists of Datum"),
        (b"no pickle", "is no stored split"),
        ((folder / STORED).read_bytes()[:60], "is no stored split"),
    ):
        (folder / STORED).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_data(folder, options=options)
    assert not (tmp_path / "made").exists()
    write_pickle(folder / STORED, {"train": [("a", 1, "x")], "val": []}, attributes=False)
    with pytest.raises(ValueError, match="holds no lists of Datum"):
        read_data(folder, options=options)


# ------------------------------------------------------------------ real data
def test_caltech_with_its_split_file():
    folder = SHARED / "data/cls/caltech101"
    if not folder.is_dir():
        pytest.skip("the small Caltech101 is not here")
    data = read_data(folder, "coop", options=ReadOptions(shots=1, shots_seed=1, subset="base"))
    assert (sizes(data), len(data.class_names)) == ((50, 50, 500), 50)
    assert data.class_names[:2] == ["face", "leopard"]
