"""Few-shot images as CoOp's code draws them, base and new classes, and both through every format."""

import json
import random
import re
from collections import Counter

import pytest
from coop_folders import write_split_file
from picture_folders import write_splits
from reference import SHARED, load_json
from test_formats import SPLIT_TABLE, pairs, sizes, write_table

from deltalens.data import ReadOptions, read_data, read_part
from deltalens.data.coop import SETS
from deltalens.data.coop_lists import read_split_file
from deltalens.data.few_shot import few_shot
from deltalens.data.selection import subset_classes, subset_parts


def labels_of(items) -> list[int]:
    return [label for _, label, _ in items]


def test_the_same_images_as_published():
    """Vectors of Dassl's generate_fewshot_dataset: 5 numbers of shots, 3 seeds, classes smaller than the shots."""
    vectors = load_json("clip_protocol_fewshot")
    train, val = (labels_of(vectors["split"][part]) for part in ("train", "val"))
    assert len(vectors["fewshot"]) == 15
    for name, wanted in vectors["fewshot"].items():
        seed, shots = (int(re.sub(r"\D", "", word)) for word in name.split("_"))
        assert few_shot(train, val, shots, seed) == (wanted["train_idx"], wanted["val_idx"]), name


def test_base_and_new_as_published(tmp_path):
    """Vectors of CoOp's subsample_classes after 4 shots with seed 1."""
    vectors = load_json("clip_protocol_fewshot")
    items = vectors["split"]
    train, _ = few_shot(labels_of(items["train"]), labels_of(items["val"]), 4, 1)
    parts = {"train": Rows([items["train"][i] for i in train]), "test": Rows(items["test"])}
    names = [name for _, name in sorted({(label, name) for _, label, name in items["train"]})]
    for subset, wanted in vectors["subsample"].items():
        chosen, class_names, _ = subset_parts(parts, names, subset)
        assert [row[:2] for row in wanted["train"]] == [
            [row[0], label] for row, label in zip(chosen["train"].rows, chosen["train"].labels, strict=True)
        ]
        assert chosen["test"].labels == wanted["test_labels"]
        assert class_names == wanted["classnames"]
    assert [len(subset_classes(37, subset)) for subset in ("all", "base", "new")] == [37, 19, 18]


class Rows:
    """Rows of a list as a part of images."""

    def __init__(self, rows):
        self.rows, self.labels = rows, labels_of(rows)

    def subset(self, indices):
        return Rows([self.rows[i] for i in indices])


def test_the_stream_is_that_of_random_seed():
    """Written out once more with the global generator: train, then val with at most 4, small classes untouched."""
    train, val = [2, 0] * 9 + [1] * 3, [0, 1, 2] * 6
    random.seed(11)
    wanted = [[], []]
    for chosen, labels, shots in zip(wanted, (train, val), (6, 4), strict=True):
        for label in dict.fromkeys(labels):
            members = [i for i, each in enumerate(labels) if each == label]
            chosen += members if len(members) < shots else random.sample(members, shots)
    assert few_shot(train, val, 6, 11) == tuple(wanted)
    assert few_shot(train, None, 6, 11) == (wanted[0], None)
    state = random.getstate()
    few_shot(train, val, 6, 11)
    assert random.getstate() == state  # the program's own generator is left alone
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        few_shot(train, val, 0, 1)


def test_coop_and_cross_modal_drew_the_same(tmp_path):
    """Index files that cross-modal adaptation published for CoOp's splits, 1 and 4 shots of seed 1."""
    protocols = SHARED / "data/protocols"
    if not protocols.is_dir():
        pytest.skip("the published index files are not here")
    for file, set_ in (("split_zhou_DescribableTextures", "dtd"), ("split_zhou_OxfordPets", "oxford_pets")):
        listed = read_split_file(protocols / "coop_splits", f"{file}.json", "", "")
        assert tuple(map(len, listed.parts.values())) == SETS[set_].sizes
        for shots in (1, 4):
            published = load_index(protocols / f"coop_fewshot_indices/{set_}_shot_{shots}-seed_1.json")
            train, val = few_shot(listed.parts["train"].labels, listed.parts["val"].labels, shots, 1)
            for part, positions in (("train", train), ("val", val)):
                assert [listed.parts[part].paths[i].name for i in positions] == published[part]


def load_index(file):
    content = json.loads(file.read_text())
    return {part: [item["impath"].split("/")[-1] for item in content[part]["data"]] for part in ("train", "val")}


# ------------------------------------------------------------------ through the formats
def test_shots_of_class_folders_and_of_a_table(tmp_path):
    folder = write_splits(tmp_path / "folder", 8, 6, 3)
    table = write_table(tmp_path / "table", SPLIT_TABLE)
    whole = read_data(folder)
    data = read_data(folder, options=ReadOptions(shots=5, shots_seed=3))
    assert sizes(data) == (15, 12, 9)
    assert Counter(data.train.labels) == {0: 5, 1: 5, 2: 5}
    train, val = few_shot(whole.train.labels, whole.val.labels, 5, 3)
    assert data.train.paths == [whole.train.paths[i] for i in train]
    assert data.val.paths == [whole.val.paths[i] for i in val]
    assert {key: data.origin[key] for key in ("format", "shots", "shots_seed", "shots_from")} == {
        "format": "folder", "shots": 5, "shots_seed": 3, "shots_from": "drawn"
    }  # fmt: skip
    by_run = read_data(folder, options=ReadOptions(shots=5, seed=3))
    assert by_run.train.paths == data.train.paths
    assert read_data(folder, options=ReadOptions(shots=5, seed=4)).train.paths != data.train.paths
    assert sizes(read_data(table, options=ReadOptions(shots=1))) == (2, 2, 4)


def test_base_classes_are_chosen_after_the_shots(tmp_path):
    folder = write_splits(tmp_path, 8, 6, 3)
    options = {subset: ReadOptions(shots=5, subset=subset) for subset in ("all", "base", "new")}
    everything, base = (read_data(folder, options=options[subset]) for subset in ("all", "base"))
    assert (base.class_names, base.origin["class_subset"]) == (["blue", "green"], "base")
    assert base.train.paths == [p for p in everything.train.paths if p.parent.name != "red"]
    assert sizes(base) == (10, 8, 6)
    with pytest.raises(ValueError, match="has 3 classes, of which new leaves 1; it needs two"):
        read_data(folder, options=options["new"])


def test_new_labels_count_from_0(tmp_path):
    folder = write_split_file(tmp_path, "split_zhou_Zoo.json", "images", ("ant", "bee", "cat", "dog", "eel"))
    data = read_data(folder, options=ReadOptions(subset="new"))
    assert (data.class_names, set(data.train.labels), set(data.test.labels)) == (["dog", "eel"], {0, 1}, {0, 1})
    assert {path.parent.name for path in data.val.paths} == {"dog", "eel"}


def test_what_cannot_be_chosen(tmp_path):
    folder = write_splits(tmp_path / "folder", 3, 1, 1)
    with pytest.raises(ValueError, match="shots are drawn for train and for val, and the protocol trainval would"):
        read_data(folder, protocol="trainval", options=ReadOptions(shots=1))
    with pytest.raises(ValueError, match="unknown classes 'novel'; there are all, base, new"):
        read_data(folder, options=ReadOptions(subset="novel"))
    with pytest.raises(ValueError, match="shots must be at least 1"):
        read_data(folder, options=ReadOptions(shots=0))
    several = write_table(tmp_path / "table", "path,label,split\na.png,cat;dog,train\nb.png,cat,val\n")
    with pytest.raises(ValueError, match="need images with one label each; the data is multilabel"):
        read_data(several, options=ReadOptions(shots=1))


def test_parts_are_read_again_as_they_were(tmp_path):
    """What `deltalens evaluate` reads of an adapter trained on few shots of the base classes."""
    folder = write_splits(tmp_path, 8, 6, 3)
    data = read_data(folder, options=ReadOptions(shots=2, shots_seed=7, subset="base"))
    for part in ("train", "val", "test"):
        assert pairs(read_part(folder, part, data.class_names, data.origin)) == pairs(getattr(data, part))
    whole = read_data(folder, options=ReadOptions(shots=2, shots_seed=7))
    assert pairs(read_part(folder, "train", whole.class_names, whole.origin)) == pairs(whole.train)
    assert len(read_part(folder, "test", whole.class_names, whole.origin, subset="base")) == 6
    with pytest.raises(ValueError, match="other classes than the 2 of the model: red"):
        read_part(folder, "test", data.class_names, data.origin, subset="all")


def test_other_data_for_a_model_of_base_classes(tmp_path):
    """Pictures of the model's own classes are all read, not the first half of them."""
    data = read_data(write_splits(tmp_path / "a", 4, 2, 2), options=ReadOptions(subset="base"))
    other = write_splits(tmp_path / "b", 4, 2, 2)
    for part in ("train", "val", "test"):
        for image in (other / part / "red").iterdir():
            image.unlink()
        (other / part / "red").rmdir()
    assert len(read_part(other, "test", data.class_names, data.origin)) == 4


def test_names_that_several_classes_have(tmp_path):
    """ImageNet calls two classes "missile" and two "sunglasses": such names find no label in another order."""
    folder = write_split_file(tmp_path, "split_zhou_Zoo.json", "images", ("ant", "bee"))
    with pytest.raises(ValueError, match="several classes of the model are called 'bee'"):
        read_part(folder, "test", ["bee", "ant", "bee"], {"format": "coop"})
