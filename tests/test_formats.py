"""Every format on a miniature of its real layout: images, labels and parts, and what wrong layouts say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deltalens.data import ReadOptions, Splits, read_data, read_part
from deltalens.data.splits import strata


def picture(file: Path, seed: int = 0) -> Path:
    """A small JPEG or PNG with one colour, which tells images apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), tuple(np.random.default_rng(seed).integers(0, 255, 3).tolist())).save(file)
    return file


def pairs(part) -> list[tuple[str, int]]:
    """(file name, label) of every item of files."""
    labels = [label.tolist() if torch.is_tensor(label) else label for label in part.labels]
    return [(path.name, label) for path, label in zip(part.paths, labels, strict=True)]


def sizes(data: Splits) -> tuple[int, ...]:
    return tuple(0 if part is None else len(part) for part in (data.train, data.val, data.test))


# ------------------------------------------------------------------ csv
def write_table(folder: Path, text: str, name: str = "labels.csv", images: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    for number, line in enumerate(text.splitlines()[1:]):
        picture(folder / images / line.replace("\t", ",").split(",")[0], number)
    return folder


SPLIT_TABLE = "path,label,split\n" + "".join(
    f"{split}-{kind}{i}.png,{kind},{name}\n"
    for split, name in (("a", "train"), ("b", "valid"), ("c", "TEST"))
    for kind in ("dog", "cat")
    for i in range(2)
)


def test_a_table_with_names_and_splits(tmp_path):
    root = write_table(tmp_path, SPLIT_TABLE, images="images")  # paths start below images/
    for where, format in ((root, "auto"), (root / "labels.csv", "auto"), (root, "csv")):
        data = read_data(where, format)
        assert data.class_names == ["cat", "dog"]
        assert pairs(data.train) == [("a-dog0.png", 1), ("a-dog1.png", 1), ("a-cat0.png", 0), ("a-cat1.png", 0)]
        assert pairs(data.val)[0] == ("b-dog0.png", 1)
        assert pairs(data.test)[3] == ("c-cat1.png", 0)
        assert (data.task, data.origin) == ("classification", {"format": "csv"})
        image, label = data.train[0]
        assert (image.size, image.mode, label) == ((10, 8), "RGB", 1)


def test_a_table_without_splits_is_split_by_seed(tmp_path):
    text = "image\tcategory\n" + "".join(f"{kind}{i}.png\t{kind}\n" for kind in (10, 9, 101) for i in range(20))
    root = write_table(tmp_path, text, "labels.tsv")
    options = ReadOptions(val_fraction=0.1, test_fraction=0.2, seed=3)
    data = read_data(root, options=options)
    assert data.class_names == ["9", "10", "101"]  # numbers by size
    assert sizes(data) == (42, 6, 12)
    assert [np.bincount(part.labels).tolist() for part in (data.train, data.val)] == [[14] * 3, [2] * 3]
    again = read_part(root, "test", data.class_names, data.origin)  # what evaluate reads
    assert pairs(again) == pairs(data.test)
    assert pairs(read_data(root, options=replace(options, seed=4)).test) != pairs(data.test)
    assert len(read_part(root, "all", data.class_names, data.origin)) == 60
    other_order = read_part(root, "test", ["101", "7", "10", "9"], data.origin)
    assert set(other_order.labels) == {0, 2, 3}
    with pytest.raises(ValueError, match=r"other classes than the 2 of the model: 101"):
        read_part(root, "test", ["9", "10"], data.origin)


def test_numbers_take_their_names_from_another_column(tmp_path):
    text = "split,path,label,class\n" + "".join(
        f"{split},{split}{i}.png,{i % 2},{('zebra', 'ant')[i % 2]}\n" for split in ("train", "val") for i in range(4)
    )
    (tmp_path / "manifest.csv").write_text(text)
    for split in ("train", "val"):
        for i in range(4):
            picture(tmp_path / f"{split}{i}.png")
    data = read_data(tmp_path)
    assert data.class_names == ["zebra", "ant"]
    assert data.train.labels == [0, 1, 0, 1]


def test_one_file_for_each_split(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        write_table(
            tmp_path, "file,label\n" + "".join(f"{split}{i}.png,{i % 2}\n" for i in range(count)), f"{split}.csv"
        )
    assert sizes(read_data(tmp_path)) == (3, 2, 1)


@pytest.mark.parametrize(("separator", "format"), [(";", "auto"), ("|", "auto"), (None, "csv/multilabel")])
def test_several_labels_in_a_cell(tmp_path, separator, format):
    cells = [f"dog{separator} cat", "dog", "", "cat"] if separator else ["dog", "dog", "", "cat"]
    text = "path,labels,split\n" + "".join(
        f"{split}{i}.png,{cell},{split}\n" for split in ("train", "val") for i, cell in enumerate(cells)
    )
    data = read_data(write_table(tmp_path, text), format)
    assert (data.task, data.class_names) == ("multilabel", ["cat", "dog"])
    first = [1, 1] if separator else [0, 1]
    assert [label.tolist() for label in data.train.labels] == [first, [0, 1], [0, 0], [1, 0]]
    assert data.val[0][1].dtype == torch.int8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,weight\na.png,7\n", "no column of labels, only path, weight"),
        ("path,label\na.png,x\nb.png,\n", r"row 2 of .*labels\.csv has no label"),
        ("path,label,split\na.png,x,dev\n", "split 'dev'; splits are called train"),
        ("path,label,split\na.png,x,train\nb.png,y,val\n", "no training image has: y"),
        ("path,label,split\na.png,x,val\nb.png,y,val\n", "splits val but no train"),
        ("path,label\na.png,x\nb.png,x\nc.png,x\nd.png,x\ne.png,x\nf.png,x\n", "too few classes"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_data(write_table(tmp_path, text), "csv")


def test_listed_images_that_are_missing(tmp_path):
    root = write_table(tmp_path, SPLIT_TABLE)
    (root / "b-cat1.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of the 12 images listed in .*labels\.csv are missing: .*b-cat1(.|\n)*path,label"
    ):
        read_data(root)
    (root / "b-cat1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be read: .*b-cat1"):
        read_data(root)
    assert sizes(read_data(root, options=ReadOptions(skip_broken=True))) == (4, 3, 4)


# ------------------------------------------------------------------ multilabel
FLAGS = "path,cat,big dog,split\na.png,1,0,train\nb.png,1.0,-1,train\nc.png,0,,val\nd.png,0,1,test\n"


def test_a_column_for_each_class(tmp_path):
    data = read_data(write_table(tmp_path, FLAGS))
    assert data.origin["format"] == "multilabel"
    assert (data.task, data.class_names) == ("multilabel", ["cat", "big dog"])
    assert pairs(data.train) == [("a.png", [1, 0]), ("b.png", [1, -1])]
    assert pairs(data.val) + pairs(data.test) == [("c.png", [0, -1]), ("d.png", [0, 1])]
    with pytest.raises(ValueError, match=r"row 1 of .* has '2' in the column cat(.|\n)*1 there"):
        read_data(write_table(tmp_path, FLAGS.replace("a.png,1", "a.png,2")), "multilabel")


def test_several_labels_are_split_by_the_rarest():
    common, rare = torch.tensor([1, 0, 0]), torch.tensor([1, 1, 0])
    none, unknown = torch.tensor([0, 0, 0]), torch.tensor([1, -1, -1])
    assert strata([common, rare, common, none, unknown]) == [0, 1, 0, -1, 0]
    assert strata([3, 1]) == [3, 1]


# ------------------------------------------------------------------ the seam
def test_formats_are_recognised_as_before_and_named(tmp_path):
    """A table beside folders that are split already does not change how these were read."""
    for split in ("train", "val"):
        for kind in ("a", "b"):
            for i in range(2):
                picture(tmp_path / split / kind / f"{i}.png", i)
    write_table(tmp_path, SPLIT_TABLE)
    data = read_data(tmp_path)
    assert (data.origin["format"], data.class_names) == ("folder", ["a", "b"])
    assert read_part(tmp_path, "val", ["b", "a"], data.origin).labels == [1, 1, 0, 0]
    assert read_part(tmp_path, "val", ["cat", "dog"], data.origin, format="csv").labels == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="unknown format 'cvs'; did you mean csv"):
        read_data(tmp_path, "cvs")
    with pytest.raises(ValueError, match="unknown protocol 'all'"):
        read_data(tmp_path, protocol="all")
    with pytest.raises(ValueError, match=r"write folder alone"):
        read_data(tmp_path, "folder/x")


def test_a_stray_table_beside_class_folders_is_passed_over(tmp_path):
    for kind in ("a", "b"):
        for i in range(8):
            picture(tmp_path / kind / f"{i}.png", i)
    for text in ("class,width\na,3\n", "path,label\nelsewhere.png,a\n", "\xff\xfe"):
        (tmp_path / "metadata.csv").write_text(text, encoding="latin-1")
        assert read_data(tmp_path).origin["format"] == "folder"
    (tmp_path / "metadata.csv").write_text("path,label\na/0.png,x\n" + "b/1.png,y\n" * 5 + "b/2.png,x\n" * 5)
    assert read_data(tmp_path).origin["format"] == "csv"


def test_the_joined_parts_of_a_folder_are_read_again(tmp_path):
    for kind in ("a", "b"):
        for i in range(10):
            picture(tmp_path / kind / f"{i}.png", i)
    data = read_data(tmp_path, protocol="trainval")
    assert sizes(data) == (16, 0, 4)
    again = read_part(tmp_path, "train", ["a", "b"], data.origin)
    assert sorted(again.paths) == sorted(data.train.paths)
    with pytest.raises(ValueError, match="no val part here"):
        read_part(tmp_path, "val", ["a", "b"], data.origin)


def test_other_data_may_lack_classes_of_a_multilabel_model(tmp_path):
    table = write_table(tmp_path / "c", "path,label,split\na.png,dog;ant,train\nb.png,ant,val\n")
    labels = read_part(table, "all", ["ant", "cat", "dog"], {}).labels
    assert [label.tolist() for label in labels] == [[1, 0, 1], [1, 0, 0]]
    flags = write_table(tmp_path / "f", FLAGS)
    labels = read_part(flags, "train", ["big dog", "cow", "cat"], {}).labels
    assert [label.tolist() for label in labels] == [[0, -1, 1], [-1, -1, 1]]


@pytest.mark.parametrize(
    "format", ["folder", "csv", "multilabel", "vtab1k/dtd", "fgvc/cub", "voc2007", "torchvision/DTD"]
)
def test_a_missing_folder_shows_what_is_expected(tmp_path, format):
    with pytest.raises(FileNotFoundError, match=r"expected|--download true"):
        read_data(tmp_path / "nowhere", format)
